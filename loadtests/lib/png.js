// Is this a whole PNG of the right size? k6 cannot decode pixels; the benchmark does.
import encoding from "k6/encoding";

const SIGNATURE = [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a];
const END = [0x49, 0x45, 0x4e, 0x44, 0xae, 0x42, 0x60, 0x82];

export function isPng(bytes, width, height) {
  const view = new DataView(bytes);
  const holds = (expected, offset) => expected.every((byte, i) => view.getUint8(offset + i) === byte);
  return (
    view.byteLength > 45 &&
    holds(SIGNATURE, 0) &&
    view.getUint32(16) === width &&
    view.getUint32(20) === height &&
    holds(END, view.byteLength - END.length)
  );
}

export function isPngBase64(text, width, height) {
  return isPng(encoding.b64decode(text), width, height);
}
