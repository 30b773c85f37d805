// What k6 says at the end: all of it as JSON where SUMMARY names a file, else what was checked and demanded.
export function handleSummary(data) {
  if (__ENV.SUMMARY) {
    return { [__ENV.SUMMARY]: JSON.stringify(data) };
  }
  const lines = [...checksOf(data.root_group), ...thresholdsOf(data.metrics)];
  return { stdout: `${lines.map(({ ok, text }) => `${ok ? "ok    " : "FAILED"} ${text}`).join("\n")}\n` };
}

function checksOf(group) {
  return group.checks.map(({ name, passes, fails }) => ({
    ok: fails === 0,
    text: `${name}: ${passes} of ${passes + fails}`,
  }));
}

function thresholdsOf(metrics) {
  return Object.entries(metrics).flatMap(([name, { thresholds = {}, values }]) =>
    Object.entries(thresholds).map(([threshold, { ok }]) => ({
      ok,
      text: `${name}: ${threshold} (${Object.entries(values)
        .map(([key, value]) => `${key} ${Number(value.toPrecision(4))}`)
        .join(", ")})`,
    })),
  );
}
