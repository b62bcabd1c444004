// Every decoding option as a control, made from what the service's own code says of it.

import { h, replace } from "./dom.js";

const GROUPS = {
  Search: ["num_beams", "num_return_sequences", "length_penalty", "early_stopping", "num_beam_groups", "diversity_penalty", "rerank"],
  Length: ["max_length", "min_length", "max_new_tokens", "min_new_tokens"],
  Words: ["prefix", "force_words", "bad_words", "suppress_tokens", "repetition_penalty", "no_repeat_ngram_size"],
  Sampling: ["do_sample", "temperature", "top_k", "top_p", "min_p", "seed"],
};

const shown = (value) => {
  if (value === undefined || value === null || (Array.isArray(value) && !value.length) || value === "") return "none";
  if (value === true) return "yes";
  if (value === false) return "no";
  return Array.isArray(value) ? value.join(", ") : String(value);
};

export class Options {
  // described: of /api/options; initial: what is set at first; changed: called after each change.
  constructor(form, described, defaults, initial, changed) {
    this.described = described;
    this.defaults = defaults;
    this.values = { ...initial };
    this.form = form;
    this.changed = changed;
    form.addEventListener("submit", (event) => event.preventDefault());
    this.render();
  }

  render() {
    const left = new Map(this.described.map((option) => [option.name, option]));
    const groups = Object.entries(GROUPS).map(([title, names]) => [title, names.filter((name) => left.has(name)).map((name) => {
      const option = left.get(name);
      left.delete(name);
      return option;
    })]);
    groups.push(["What is told", [...left.values()]]);
    replace(this.form,
      groups.map(([title, options]) => h("fieldset", {}, h("legend", {}, title), options.map((option) => this.control(option)))),
      h("div", { className: "row" }, h("button", { type: "button", id: "options-reset", onclick: () => this.reset() }, "Back to the checkpoint's own")));
  }

  reset() {
    this.values = {};
    this.render();
    this.changed();
    this.form.querySelector("#options-reset").focus();
  }

  set(name, value) {
    if (value === undefined) delete this.values[name];
    else this.values[name] = value;
    this.changed();
  }

  control(option) {
    const id = `option-${option.name}`;
    const notes = [option.help, option.range ? `${option.range}.` : "", `Default: ${shown(this.defaults[option.name] ?? option.default)}.`];
    return h("div", { className: "option" },
      h("label", { htmlFor: id }, option.name),
      this.input(option, id),
      h("p", { id: `${id}-help`, className: "quiet" }, notes.filter(Boolean).join(" ")));
  }

  input(option, id) {
    const value = this.values[option.name];
    const common = { id, name: option.name, "aria-describedby": `${id}-help` };
    if (option.kind === "bool" || option.words.length) {
      const choices = option.kind === "bool" ? [["yes", true], ["no", false]] : [];
      choices.push(...option.words.map((word) => [word, word]));
      const select = h("select", common,
        h("option", { value: "" }, "default"),
        choices.map(([text, each], place) => h("option", { value: String(place), selected: value === each }, text)));
      select.addEventListener("change", () => this.set(option.name, select.value === "" ? undefined : choices[Number(select.value)][1]));
      return select;
    }
    const read = option.kind === "str" ? (text) => text : Number;
    if (option.is_list) {
      const area = h("textarea", { ...common, rows: 2, placeholder: "one a line", value: (value ?? []).join("\n") });
      area.addEventListener("input", () => {
        const lines = area.value.split("\n").filter((line) => line.trim());
        this.set(option.name, lines.length ? lines.map(read) : undefined);
      });
      return area;
    }
    const number = option.kind !== "str";
    const input = h("input", {
      ...common,
      type: number ? "number" : "text",
      placeholder: shown(this.defaults[option.name] ?? option.default),
      value: value ?? "",
      maxLength: option.max_characters ?? 524288,
    });
    if (number) {
      input.step = option.kind === "int" ? "1" : "any";
      if (option.least !== null) input.min = option.least;
      if (option.most !== null) input.max = option.most;
    }
    input.addEventListener("input", () => {
      if (number && input.validity.badInput) return;
      this.set(option.name, input.value === "" ? undefined : read(input.value));
    });
    return input;
  }

  // Names the controls that an error is about, and says why beside them.
  showFaults(fields) {
    for (const option of this.described) {
      const input = this.form.querySelector(`#option-${option.name}`);
      const fault = fields[`options.${option.name}`];
      input.setAttribute("aria-invalid", String(Boolean(fault)));
      const help = this.form.querySelector(`#option-${option.name}-help`);
      help.querySelector(".fault")?.remove();
      if (fault) help.prepend(h("strong", { className: "fault" }, `${fault}. `));
    }
  }
}
