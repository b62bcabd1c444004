// The page: what is shown, what is asked, and what follows from what.

import { altTextPanel } from "./alttext.js";
import { captions, Failed, get, getBlob } from "./api.js";
import { beamsPanel, grow, growingPanel } from "./beams.js";
import { codePanel } from "./code.js";
import { byId, figure, h, milliseconds, panel, percent, replace } from "./dom.js";
import { clearHeat, drawHeat } from "./heat.js";
import { Options } from "./options.js";
import { Regions } from "./regions.js";
import { timingPanel } from "./timing.js";
import { asCsv, asJsonLines, save, thumbnailOf, visitList } from "./visit.js";
import { captionElement, captionsPanel, wordPanel } from "./words.js";

// Pictures that are kept to be looked at again; of earlier ones only what was said.
const KEPT = 100;

const entries = [];
const view = { form: "Python", dropped: false, steps: null, budget: 125, nearby: "" };
let current = null;
let working = null;
let drawing = 0;
let facts = null;
let options = null;

const image = byId("image");
const regions = new Regions(image, byId("boxes"), byId("regions"), () => {});

const say = (text) => { byId("status").textContent = text; };

// --- Asking ---------------------------------------------------------------------------------------

function add(name, blob) {
  const entry = {
    name, blob, url: URL.createObjectURL(blob), thumbnail: "/icon.svg", state: "waiting", text: "", steps: [], begun: performance.now(), caption: 0, word: null,
  };
  const limit = facts?.bounds?.image_bytes ?? Infinity;
  if (blob.size > limit) {
    entry.state = "error";
    entry.error = { reason: "IMAGE_TOO_LARGE", message: `the picture has more than ${(limit / 2 ** 20).toFixed(0)} MiB` };
  }
  entries.unshift(entry);
  for (const old of entries.splice(KEPT)) URL.revokeObjectURL(old.url);
  look(entry);
  return entry;
}

// The asking does not wait for this: what only the service can read is captioned too.
async function look(entry) {
  const picture = new Image();
  picture.src = entry.url;
  try {
    await picture.decode();
  } catch {
    entry.unshown = true;
    if (entry === current) show(entry);
    return;
  }
  Object.assign(entry, { width: picture.naturalWidth, height: picture.naturalHeight, thumbnail: await thumbnailOf(picture) });
  renderVisit();
}

async function addAll(files) {
  const found = files.map(({ name, blob }) => add(name, blob));
  if (!found.length) return;
  regions.clear();
  open(found[0]);
  await next();
}

// One after the other: the newest picture's words are what somebody waits for.
async function next() {
  if (working) return;
  const entry = current?.state === "waiting" ? current : entries.findLast((each) => each.state === "waiting");
  if (!entry) return;
  working = new AbortController();
  // Who waited for others has not waited for the service.
  if (entry !== current) entry.begun = performance.now();
  Object.assign(entry, { state: "working", text: "", steps: [] });
  entry.asked = { options: { ...options.values }, ...regions.framing() };
  options.showFaults({});
  render(entry);
  if (entry === current) say("Working");
  try {
    for await (const event of captions(entry.asked, entry.blob, working.signal)) {
      if (event.text !== undefined) {
        entry.text += event.text;
        entry.steps.push(...event.beam_steps);
        if (event.text) entry.firstWords ??= performance.now() - entry.begun;
        if (entry === current) showGrowth(entry);
      } else if (event.error) {
        throw new Failed(event.error);
      } else {
        const inAll = performance.now() - entry.begun;
        Object.assign(entry, {
          result: event.result, seconds: event.seconds, inAll, firstWords: entry.firstWords ?? inAll, state: "done", steps: [], caption: 0, word: null,
        });
      }
    }
  } catch (error) {
    if (error.name === "AbortError") entry.state = "stopped";
    else if (error instanceof Failed) Object.assign(entry, { state: "error", error: error.error, steps: [] });
    else throw error;
  } finally {
    working = null;
  }
  view.steps = null;
  if (entry === current) {
    render(entry);
    if (entry.state === "done") say(`Caption: ${entry.result.captions[0].text}. Confidence ${percent(entry.result.captions[0].confidence)}.`);
    if (entry.state === "error") say(`No caption: ${entry.error.message}`);
    if (entry.state === "stopped") say("Stopped");
  } else {
    renderVisit();
  }
  await next();
}

function again() {
  if (!current || current.state === "working") return;
  Object.assign(current, { state: "waiting", error: null, firstWords: undefined, begun: performance.now() });
  next();
}

// --- Showing --------------------------------------------------------------------------------------

function open(entry) {
  current = entry;
  view.steps = null;
  show(entry);
  regions.boxes = (entry.asked?.regions ?? []).map((box) => [...box]);
  regions.tiles = entry.asked?.tiles ?? null;
  render(entry);
}

function show(entry) {
  const unshown = Boolean(entry.unshown);
  byId("canvas").hidden = unshown;
  byId("stage").classList.toggle("empty", unshown);
  const invitation = byId("invitation");
  invitation.hidden = !unshown;
  if (unshown) return replace(invitation, h("p", { className: "quiet" }, `${entry.name}: this browser cannot show it.`));
  image.src = entry.url;
  image.alt = entry.name;
  return image.decode().then(() => {
    byId("canvas").style.setProperty("--ratio", image.naturalWidth / image.naturalHeight);
    regions.render();
  }, () => {});
}

function showGrowth(entry) {
  if (entry.text) {
    const caption = byId("caption");
    caption.className = "caption growing";
    caption.textContent = entry.text;
    byId("doing").textContent = "";
  }
  if (!entry.steps.length) return;
  // Once a frame: several steps may have come since the last.
  drawing ||= requestAnimationFrame(() => {
    drawing = 0;
    if (!current.steps.length) return;
    if (byId("beams")) grow(byId("beams"), current.steps, view);
    else renderPanels(current, null);
  });
}

function render(entry) {
  const done = entry.state === "done";
  const caption = done ? entry.result.captions[entry.caption] : null;
  const failed = entry.state === "error";
  byId("stage").dataset.state = entry.state;
  byId("again").disabled = entry.state === "working" || !entry.blob;
  byId("mark").disabled = Boolean(entry.unshown);
  byId("stop").hidden = entry.state !== "working";
  byId("error").hidden = !failed;
  if (failed) {
    replace(byId("error"),
      h("p", {}, h("strong", {}, "No caption. "), sentence(entry.error.message)),
      h("p", { className: "quiet" }, entry.error.reason));
    options?.showFaults(entry.error.fields ?? {});
    if (Object.keys(entry.error.fields ?? {}).length) byId("options-panel").open = true;
  }
  byId("doing").textContent = { working: "Looking …", waiting: "Waiting for its turn", stopped: "Stopped." }[entry.state] ?? "";
  const text = byId("caption");
  text.hidden = failed;
  text.className = "caption";
  if (!done) text.textContent = entry.text;
  replace(byId("facts"), done ? factsOf(entry, caption) : []);
  renderWord(entry, caption);
  renderPanels(entry, caption);
  renderVisit();
}

// As a person would write it; the name of an option stays as it is.
const sentence = (text) => text.replace(/^[a-z]+(?=[ ,])/, (word) => word.charAt(0).toUpperCase() + word.slice(1)) + (/[.?!]$/.test(text) ? "" : ".");

function factsOf(entry, caption) {
  const facts = [
    ["Confidence", percent(caption.confidence)],
    ["Score", figure(caption.score)],
    ["First words", milliseconds(entry.firstWords)],
    ["In all", milliseconds(entry.inAll)],
  ];
  if (caption.grounding !== undefined && caption.grounding !== null) facts.splice(2, 0, ["Grounding", figure(caption.grounding, 2)]);
  return facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)));
}

function renderPanels(entry, caption, focused = focusIn(byId("panels"))) {
  const redraw = (id) => renderPanels(entry, caption, id);
  replace(byId("panels"), caption ? panelsOf(entry, caption, redraw) : entry.steps.length ? growingPanel(view, redraw) : null);
  if (!caption && entry.steps.length) grow(byId("beams"), entry.steps, view);
  // What was being looked at is drawn anew when the search has ended, too.
  byId(focused)?.focus({ preventScroll: true });
}

const focusIn = (element) => (element.contains(document.activeElement) ? document.activeElement.id : "");

function panelsOf(entry, caption, redraw) {
  const { result } = entry;
  return [
    captionsPanel(result.captions, entry.caption, chooseCaption),
    result.regions?.length ? regionsPanel(result.regions) : null,
    altTextPanel(entry, caption, view),
    result.beams ? beamsPanel(result.beams, entry.caption, view, redraw) : null,
    timingPanel(result, entry.seconds),
    codePanel(entry, facts, options.described, view, redraw),
  ];
}

function regionsPanel(found) {
  return panel("region-captions", "Regions", "",
    h("ol", { className: "captions" }, found.map((region) => h("li", { className: "region" },
      h("span", { className: "said" }, region.captions[0]?.text ?? "(nothing in time)"),
      h("span", { className: "quiet figures" }, `${region.box.join(", ")} · ${region.captions.length ? `confidence ${percent(region.captions[0].confidence)}` : ""}`)))));
}

// All that depends on the chosen word: its mark, its panel, and the picture.
function renderWord(entry, caption) {
  if (caption) replace(byId("caption"), captionElement(caption, entry.word, chooseWord));
  if (!caption || entry.word === null) {
    replace(byId("word-slot"));
    clearHeat(byId("heat"));
    return;
  }
  replace(byId("word-slot"), wordPanel(caption, entry.word, entry.result.beams?.paths[entry.caption]));
  drawHeat(byId("heat"), caption, entry.word, entry.asked.resize, image);
}

function renderVisit() {
  byId("visit").hidden = !entries.length;
  visitList(byId("entries"), entries, current, open);
}

function chooseWord(number) {
  current.word = current.word === number ? null : number;
  renderWord(current, current.result.captions[current.caption]);
  byId("caption").querySelectorAll(".word")[number].focus();
}

function chooseCaption(number) {
  Object.assign(current, { caption: number, word: null });
  render(current);
  byId("captions").querySelectorAll(".choice")[number].focus();
  say(`Caption ${number + 1}: ${current.result.captions[number].text}`);
}

// --- Beginning ------------------------------------------------------------------------------------

// Of whatever kind: what is no picture, the service says in words.
function takeFiles(list) {
  return addAll([...list].map((file) => ({ name: file.name || "pasted.png", blob: file })));
}

function listen() {
  const stage = byId("stage");
  let inside = 0;
  const dragging = (change) => {
    inside = Math.max(0, inside + change);
    stage.classList.toggle("dragging", inside > 0);
  };
  document.addEventListener("dragenter", (event) => { event.preventDefault(); dragging(1); });
  document.addEventListener("dragleave", () => dragging(-1));
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    dragging(-inside);
    takeFiles(event.dataTransfer.files);
  });
  document.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) takeFiles(event.clipboardData.files);
  });
  byId("file").addEventListener("change", async (event) => {
    await takeFiles([...event.target.files]);
    event.target.value = "";
  });
  byId("again").addEventListener("click", again);
  byId("stop").addEventListener("click", () => working?.abort());
  byId("mark").addEventListener("click", () => {
    regions.marking = !regions.marking;
    byId("mark").setAttribute("aria-pressed", String(regions.marking));
    byId("regions").hidden = !regions.marking;
    stage.classList.toggle("marking", regions.marking);
    regions.render();
  });
  byId("export-csv").addEventListener("click", () => save(asCsv(entries), "captions.csv", "text/csv"));
  byId("export-jsonl").addEventListener("click", () => save(asJsonLines(entries), "captions.jsonl", "application/jsonl"));
}

async function showSamples() {
  const paths = await get("/samples/index.json");
  replace(byId("samples"), paths.map((path) => {
    const name = path.split("/").at(-1);
    const take = async () => addAll([{ name, blob: await getBlob(path) }]);
    return h("li", {}, h("button", { type: "button", className: "sample", "aria-label": `Sample ${name}`, onclick: take },
      h("img", { src: path, alt: "", width: 72, height: 72, draggable: false })));
  }));
}

// What the page wants to see at first; the checkpoint's own holds for all else.
function initial(described, defaults) {
  const known = new Set(described.map((option) => option.name));
  const beams = (defaults.num_beams ?? 1) > 1 ? {} : { num_beams: 4 };
  const wanted = {
    ...beams,
    num_return_sequences: Math.min(4, defaults.num_beams > 1 ? defaults.num_beams : 4),
    output_attentions: true, output_beams: true, output_stages: true, output_grounding: true,
  };
  return Object.fromEntries(Object.entries(wanted).filter(([name]) => known.has(name)));
}

async function begin() {
  listen();
  const [{ options: described }, model] = await Promise.all([get("/api/options"), get("/api/model"), showSamples()]);
  facts = model.error ? null : model;
  const served = facts?.models.find((each) => each.is_default) ?? facts?.models[0];
  byId("model").textContent = served
    ? `${facts.where} · version ${served.version} · ${served.precision} · reads ${served.image_size[1]} × ${served.image_size[0]} pixels`
    : `No model: ${model.error.message}`;
  regions.most = facts?.regions ?? 16;
  const defaults = served?.defaults ?? {};
  const count = () => {
    const set = Object.keys(options.values).length;
    byId("options-set").textContent = `${set} set`;
  };
  options = new Options(byId("options"), described, defaults, initial(described, defaults), count);
  count();
  document.documentElement.dataset.ready = "true";
}

begin().catch((error) => {
  if (!(error instanceof Failed)) throw error;
  byId("model").textContent = sentence(error.message);
});
