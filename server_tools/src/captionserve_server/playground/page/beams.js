// The tree of a search: what each step might have become, as a picture and as a table.

import { figure, h, panel, percent, probability, s, table } from "./dom.js";

const WIDTH = 104;
const HEIGHT = 42;
const LEFT = 8;
const TOP = 26;
const SHOWN = 11;

const label = (each) => each.token_text.trim() || "(end)";
const short = (text) => (text.length > SHOWN ? `${text.slice(0, SHOWN - 1)}…` : text);

// Which continuations each shown caption has taken: "step/place".
const taken = (path) => new Set(path.continuations.map((place, step) => `${step}/${place}`));

function places(steps, withDropped) {
  return steps.map((step) => {
    const shown = step.map((each, place) => ({ each, place })).filter(({ each }) => withDropped || each.fate !== "dropped");
    shown.forEach((node, row) => { node.row = row; });
    return shown;
  });
}

// Of a search that still goes on there is no path, and what came last is new.
function tree(steps, path, withDropped) {
  const columns = places(steps, withDropped);
  const own = path ? taken(path) : new Set();
  const rows = Math.max(1, ...columns.map((column) => column.length));
  const width = LEFT + WIDTH * Math.max(1, columns.length);
  const height = TOP + HEIGHT * rows + 6;
  const edges = [];
  const nodes = [];
  columns.forEach((column, step) => {
    const x = LEFT + WIDTH * step;
    nodes.push(s("text", { x, y: 14, class: "step" }, `${step + 1}`));
    for (const { each, place, row } of column) {
      const y = TOP + HEIGHT * row;
      const isOwn = own.has(`${step}/${place}`);
      const before = columns[step - 1]?.find((node) => node.each.beam === each.parent);
      if (before) {
        const from = [x - WIDTH + 84, TOP + HEIGHT * before.row + 16];
        edges.push(s("path", {
          class: `edge ${each.fate}${isOwn ? " own" : ""}`,
          d: `M${from} C${from[0] + 12},${from[1]} ${x - 12},${y + 16} ${x},${y + 16}`,
        }));
      }
      const isNew = !path && step === columns.length - 1;
      nodes.push(s("g", { class: `node ${each.fate}${isOwn ? " own" : ""}${isNew ? " new" : ""}` },
        s("title", {}, `${label(each)}: ${percent(probability(each.token_logprob))}, ${each.fate}`),
        s("rect", { x, y, width: 84, height: 32, rx: 7 }),
        s("text", { x: x + 8, y: y + 14 }, short(label(each))),
        s("text", { x: x + 8, y: y + 26, class: "share" }, percent(probability(each.token_logprob)))));
    }
  });
  return s("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-labelledby": "tree-title" },
    s("title", { id: "tree-title" }, path
      ? `Search tree of ${columns.length} steps; the chosen caption is marked. The table below says the same.`
      : `Search tree of the ${columns.length} steps so far.`),
    edges, nodes);
}

const pictured = (drawn) => h("div", { className: "scroll tree", id: "beam-tree", tabIndex: 0, role: "region", "aria-label": "Search tree" }, drawn);

const droppedBox = (view, redraw) => h("label", { className: "check" },
  h("input", { type: "checkbox", id: "beam-dropped", checked: view.dropped, onchange: (event) => { view.dropped = event.target.checked; redraw("beam-dropped"); } }),
  "also what was dropped");

function counted(steps) {
  const count = (fate) => steps.flat().filter((each) => each.fate === fate).length;
  return `${count("kept")} kept · ${count("finished")} finished · ${count("dropped")} dropped`;
}

// For a search that goes on, to be filled by `grow`; nothing of it is announced.
export const growingPanel = (view, redraw) => panel("beams", "Search", " ", pictured([]), h("div", { className: "row" }, droppedBox(view, redraw)));

export function grow(section, steps, view) {
  const picture = section.querySelector(".tree");
  // Who has scrolled back is not taken away from there.
  const atEnd = picture.scrollLeft + picture.clientWidth > picture.scrollWidth - WIDTH;
  picture.replaceChildren(tree(steps, null, view.dropped));
  section.querySelector(".spread .quiet").textContent = counted(steps);
  if (atEnd && !matchMedia("(prefers-reduced-motion: reduce)").matches) picture.scrollLeft = picture.scrollWidth;
}

export function beamsPanel(beams, captionNumber, view, redraw) {
  const path = beams.paths[captionNumber];
  const all = beams.steps.length;
  const steps = Math.min(view.steps ?? all, all);
  const shown = () => tree(beams.steps.slice(0, view.steps ?? all), path, view.dropped);
  const picture = pictured(shown());
  const slider = h("input", { type: "range", id: "beam-steps", min: 1, max: all, value: steps });
  slider.addEventListener("input", () => {
    view.steps = Number(slider.value);
    picture.replaceChildren(shown());
    picture.scrollLeft = picture.scrollWidth;
    slider.nextElementSibling.textContent = `${view.steps} of ${all}`;
  });
  const rows = beams.steps.flatMap((step, number) => step.map((each, place) => [
    String(number + 1), String(each.parent), label(each), percent(probability(each.token_logprob)), figure(each.score),
    each.fate === "kept" ? `kept as ${each.beam}` : each.fate,
    path.continuations[number] === place ? "yes" : "",
  ]));
  return panel("beams", "Search", counted(beams.steps),
    picture,
    h("div", { className: "row" },
      h("label", { htmlFor: "beam-steps" }, "Steps shown"), slider, h("output", { htmlFor: "beam-steps", className: "quiet" }, `${steps} of ${all}`),
      droppedBox(view, redraw)),
    h("details", {}, h("summary", {}, "As a table"),
      table("Continuations of each step", ["Step", "Beam", "Token", "Probability", "Sum", "Fate", "In the caption"], rows)));
}
