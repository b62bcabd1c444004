// How long an answer took, stage by stage.

import { h, milliseconds, panel } from "./dom.js";

const GROUPS = [
  ["Waiting", ["turn", "image_queue", "queue"]],
  ["Image", ["preprocess"]],
  ["Encoder", ["encode"]],
  ["Prefill", ["prefill"]],
  ["Steps", ["first_step", "steps"]],
  ["Answer", ["answer"]],
];

export function timingPanel(result, seconds) {
  if (result.cached) return panel("timing", "Time", "remembered: nothing was computed");
  if (!result.stages.length) return null;
  const known = new Map(result.stages.map((stage) => [stage.name, stage.milliseconds]));
  const groups = GROUPS.map(([name, stages]) => [name, stages.reduce((sum, stage) => sum + (known.get(stage) ?? 0), 0)]);
  const inside = groups.reduce((sum, [, value]) => sum + value, 0);
  // Between the page's server and the service.
  groups.push(["Way", Math.max(0, 1000 * seconds - inside)]);
  const shown = groups.filter(([, value]) => value >= 0.05);
  const whole = shown.reduce((sum, [, value]) => sum + value, 0);
  return panel("timing", "Time", milliseconds(1000 * seconds),
    h("div", { className: "stages", "aria-hidden": "true" },
      shown.map(([name, value]) => h("span", { className: `stage-${name.toLowerCase()}`, css: { "flex-grow": String(value / whole) } }))),
    h("dl", { className: "legend" },
      shown.map(([name, value]) => h("div", { className: `stage-${name.toLowerCase()}` }, h("dt", {}, name), h("dd", {}, milliseconds(value))))));
}
