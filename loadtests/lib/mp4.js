// Whether bytes are an MP4 file: its first box is `ftyp`.
export function isMp4(buffer) {
  const bytes = new Uint8Array(buffer.slice(4, 8));
  return String.fromCharCode(...bytes) === "ftyp";
}
