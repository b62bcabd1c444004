// What was just done, to be done again elsewhere.

import { copyButton, h, panel } from "./dom.js";

const python = (value) => {
  if (value === true) return "True";
  if (value === false) return "False";
  if (value === null) return "None";
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  return JSON.stringify(value);
};

const quoted = (text) => (/^[\w./:@%+=-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

function asPython(name, asked, facts) {
  const options = Object.entries(asked.options);
  const framing = [
    asked.regions?.length ? `regions=[${asked.regions.map((box) => `(${box.join(", ")})`).join(", ")}]` : "",
    asked.tiles ? `tiles=(${asked.tiles.join(", ")})` : "",
    asked.resize ? `resize=${python(asked.resize)}` : "",
  ].filter(Boolean);
  const lines = options.map(([key, value]) => `    ${key}=${python(value)},`);
  const call = ["client.caption(", [python(name), lines.length ? "options" : "", ...framing].filter(Boolean).join(", "), ")"].join("");
  return [
    `from captionserve import CaptionClient${lines.length ? ", GenerationOptions" : ""}`,
    "",
    ...(lines.length ? ["options = GenerationOptions(", ...lines, ")"] : []),
    `with CaptionClient(${python(facts?.where ?? "127.0.0.1:9000")}) as client:`,
    `    result = ${call}`,
    "    print(result.text)",
  ].join("\n");
}

function asShell(name, asked, facts, described) {
  const flags = Object.entries(asked.options).flatMap(([key, value]) => {
    const option = described.find((each) => each.name === key);
    if (option.kind === "bool" && !option.words.length) {
      return [value ? option.flag : option.flag.replace("--", "--no-")];
    }
    const values = Array.isArray(value) ? value : [value];
    return values.map((each) => `${option.flag} ${quoted(String(each))}`);
  });
  const framing = [
    ...(asked.regions ?? []).map((box) => `--region ${box.join(",")}`),
    asked.tiles ? `--tiles ${asked.tiles.join("x")}` : "",
    asked.resize ? `--resize ${asked.resize}` : "",
  ].filter(Boolean);
  const where = facts?.streams === false ? `--local ${quoted(facts.where)}` : `--target ${facts?.where ?? "127.0.0.1:9000"}`;
  return [`captionserve caption ${quoted(name)}`, where, ...flags, ...framing].join(" \\\n    ");
}

const asJson = (name, asked) => JSON.stringify({ image: name, ...asked }, null, 2);

export function codePanel(entry, facts, described, view, redraw) {
  const forms = {
    Python: () => asPython(entry.name, entry.asked, facts),
    Shell: () => asShell(entry.name, entry.asked, facts, described),
    JSON: () => asJson(entry.name, entry.asked),
  };
  const text = forms[view.form]();
  return panel("code", "The same in code", "",
    h("div", { className: "row spread" },
      h("div", { className: "row", role: "group", "aria-label": "Form" }, Object.keys(forms).map((form) => h("button", {
        type: "button", id: `form-${form}`, className: "tab", "aria-pressed": String(view.form === form),
        onclick: () => { view.form = form; redraw(`form-${form}`); },
      }, form))),
      copyButton(() => text)),
    h("pre", { tabIndex: 0, role: "region", "aria-label": view.form }, h("code", {}, text)));
}
