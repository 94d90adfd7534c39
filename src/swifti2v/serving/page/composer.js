// The form: what to make, what it would take, and what is wrong with it.

import { createVideo, estimate } from "./api.js";
import { duration, element, find, lengthOf, memory, plural, sizeOf } from "./words.js";

const ESTIMATE_MILLISECONDS = 500;
const HALF_SIZE = "Give width and height, or neither.";
const NO_NUMBER = "This is not a number.";
const NO_LATER_PROMPT = "Write each later prompt in a line with its first frame, such as 17: zoom in";
const MORE = ["motion_reference", "num_inference_steps", "guidance_scale", "fps", "negative_prompt", "later_prompts",
  "truncate_prompt", "segment_size", "context_size", "fit", "background", "loras"];

export class Composer {
  // `onMade(video)` is told of a job that is queued, `onError(error)` of failures of the connection.
  constructor({ onMade, onError }) {
    Object.assign(this, { onMade, onError, photo: null, models: [] });
    this.form = find("#composer");
    this.form.addEventListener("submit", (event) => { event.preventDefault(); this.submit(); });
    this.form.addEventListener("input", (event) => this.changed(event.target));
    this.form.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.submit();
    });
    find("#photo").addEventListener("change", (event) => {
      if (event.target.files.length) this.setPhoto(event.target.files[0]);
    });
    find("#motion-remove").addEventListener("click", () => this.setMotion(null));
  }

  setModels(models) {
    this.models = models;
    const before = find("#model").value;
    find("#model").replaceChildren(...models.map(({ id }) => new Option(id, id)));
    if (models.some(({ id }) => id === before)) find("#model").value = before;
    find("#model-field").hidden = models.length < 2;
    this.showModel();
  }

  get model() {
    return this.models.find(({ id }) => id === find("#model").value);
  }

  // Suggestions, LoRAs and usual values of the chosen model.
  showModel() {
    const { model } = this;
    find("#seconds").placeholder = lengthOf(model.default_num_frames, model.default_fps);
    find("#fps").placeholder = model.default_fps;
    const phrases = Object.keys(model.vocabulary);
    find("#suggestions").hidden = !phrases.length;
    find("#suggestions").replaceChildren(...phrases.map((phrase) => {
      const chip = element("button", { type: "button", textContent: phrase });
      chip.addEventListener("click", () => this.toggle(phrase));
      return chip;
    }));
    find("#lora-field").hidden = !model.loras.length;
    find("#loras").replaceChildren(...model.loras.map(loraRow));
    this.markChips();
    this.estimate();
  }

  // Put a phrase of the vocabulary into the prompt, or take it out.
  toggle(phrase) {
    const prompt = find("#prompt");
    const parts = prompt.value.split(",").map((part) => part.trim()).filter(Boolean);
    const rest = parts.filter((part) => part !== phrase);
    prompt.value = (rest.length < parts.length ? rest : [...parts, phrase]).join(", ");
    this.changed(prompt);
  }

  markChips() {
    const parts = find("#prompt").value.split(",").map((part) => part.trim());
    for (const chip of find("#suggestions").children) {
      chip.setAttribute("aria-pressed", parts.includes(chip.textContent));
    }
  }

  setPhoto(file) {
    this.photo = file;
    const view = find("#photo-view");
    URL.revokeObjectURL(view.src);
    view.hidden = true;
    view.onload = () => {
      view.hidden = false;
      const size = sizeOf(`${view.naturalWidth}x${view.naturalHeight}`);
      find("#photo-text").textContent = `${file.name}, ${size}. Choose another`;
    };
    view.src = URL.createObjectURL(file); // some browsers show no HEIC: then its name is all
    view.alt = `Your photo ${file.name}`;
    find("#photo-text").textContent = `${file.name}. Choose another`;
    find("#photo-drop").classList.add("is-filled");
    this.changed(find("#photo"));
  }

  setMotion(file) {
    const files = new DataTransfer();
    if (file) {
      files.items.add(file);
      find("#more").open = true;
    }
    find("#motion").files = files.files;
    this.changed(find("#motion"));
  }

  changed(field) {
    if (field.id === "model") this.showModel();
    if (field.id === "prompt") this.markChips();
    find("#motion-remove").hidden = !find("#motion").files.length;
    this.clearProblem();
    clearTimeout(this.timer);
    this.estimating?.abort();
    find("#estimate").classList.add("is-old");
    this.timer = setTimeout(() => this.estimate(), ESTIMATE_MILLISECONDS);
  }

  // The request as a form; what is left empty is the server's choice.
  body() {
    const body = new FormData();
    for (const [name, value] of new FormData(this.form)) {
      if (typeof value !== "string" || !value.trim()) continue;
      body.append(name, name === "later_prompts" ? JSON.stringify(readLater(value)) : value.trim());
    }
    const [width, height] = [find("#width").value, find("#height").value];
    if (width) body.append("size", `${width}x${height}`);
    const loras = [...find("#loras").children].map(readLora).filter(Boolean);
    if (loras.length) body.append("loras", JSON.stringify(loras));
    if (this.photo) body.append("input_reference", this.photo, this.photo.name);
    const [motion] = find("#motion").files;
    if (motion) body.append("motion_reference", motion, motion.name);
    return body;
  }

  // What the server cannot see to be wrong, as words and a field: browsers hand over what is no number as nothing.
  get mistake() {
    const bad = [...this.form.elements].find((input) => input.validity?.badInput);
    if (bad) return [NO_NUMBER, bad.closest("[data-field]").dataset.field];
    if (Boolean(find("#width").value) !== Boolean(find("#height").value)) return [HALF_SIZE, "size"];
    if (!readLater(find("#later").value)) return [NO_LATER_PROMPT, "later_prompts"];
    return null;
  }

  get isComplete() {
    return Boolean(this.photo && find("#prompt").value.trim() && !this.mistake);
  }

  async estimate() {
    const place = find("#estimate");
    if (!this.isComplete) return this.askForMore();
    if (!find("strong", place)) place.textContent = "Checking\u2026";
    const { signal } = (this.estimating = new AbortController());
    try {
      const found = await estimate(this.body(), signal);
      place.replaceChildren(...describe(found));
    } catch (error) {
      if (signal.aborted) return;
      place.replaceChildren();
      this.fail(error);
    } finally {
      if (!signal.aborted) place.classList.remove("is-old");
    }
  }

  askForMore() {
    find("#estimate").classList.remove("is-old");
    find("#estimate").textContent = this.mistake?.[0] ?? "With a photo and a prompt, time and memory are shown here.";
  }

  async submit() {
    if (this.isSending) return;
    if (!this.photo) return this.showProblem("Choose a photo first.", "input_reference");
    if (!find("#prompt").value.trim()) return this.showProblem("Say what happens in the video.", "prompt");
    if (this.mistake) return this.showProblem(...this.mistake);
    clearTimeout(this.timer);
    this.setSending(true);
    // A request that is sent again after a broken connection makes no second video.
    this.repeatKey ??= crypto.getRandomValues(new Uint32Array(4)).join("-");
    try {
      const video = await createVideo(this.body(), this.repeatKey);
      this.repeatKey = null;
      this.clearProblem();
      this.onMade(video, this.photo);
      if (find("#estimate").matches(".is-old")) this.estimate();
    } catch (error) {
      if (!error.isOffline) this.repeatKey = null;
      this.fail(error);
    } finally {
      this.setSending(false);
    }
  }

  setSending(isSending) {
    this.isSending = isSending;
    find("#submit").setAttribute("aria-disabled", isSending);
    find("#submit").textContent = isSending ? "Sending" : "Make the video";
  }

  fail(error) {
    if (error.status === 401) this.onError(error);
    else this.showProblem(error.message, error.param);
  }

  // Say what is missing, which is no error.
  ask(message, param) {
    this.showProblem(message, param);
    find("#problem").classList.remove("error");
  }

  showProblem(message, param) {
    const place = find("#problem");
    place.textContent = message;
    place.hidden = false;
    place.classList.add("error");
    if (MORE.includes(param)) find("#more").open = true;
    const field = param && find(`[data-field="${CSS.escape(param)}"]`);
    for (const input of field?.querySelectorAll("input, textarea, select") ?? []) {
      input.setAttribute("aria-invalid", "true");
      input.setAttribute("aria-describedby", "problem");
    }
    find("#photo-drop").classList.toggle("is-bad", param === "input_reference");
  }

  clearProblem() {
    find("#problem").hidden = true;
    find("#photo-drop").classList.remove("is-bad");
    for (const input of this.form.querySelectorAll("[aria-invalid]")) {
      input.removeAttribute("aria-invalid");
      input.removeAttribute("aria-describedby");
    }
  }

  // Fill the form; names that are missing become empty.
  fill(values, photo) {
    for (const name of ["prompt", "seconds", "seed", ...MORE]) {
      const input = this.form.elements[name];
      if (input?.type === "checkbox") input.checked = Boolean(values[name]);
      else if (input && input.type !== "file") input.value = values[name] ?? "";
    }
    if (this.models.some(({ id }) => id === values.model)) {
      find("#model").value = values.model;
      this.showModel();
    }
    [find("#width").value, find("#height").value] = values.size ? values.size.split("x") : ["", ""];
    const names = new Map((values.loras ?? []).map((lora) => [lora.name, lora]));
    for (const row of find("#loras").children) writeLora(row, names.get(row.dataset.name));
    this.setMotion(null);
    find("#more").open = MORE.some((name) => String(values[name] ?? ""));
    if (photo) this.setPhoto(photo);
    this.markChips();
    this.changed(find("#prompt"));
  }
}

function describe(found) {
  const time = found.eta_seconds == null
    ? "time not known before the first video" : `about ${duration(found.eta_seconds)}`;
  const parts = [time, `${memory(found.memory_bytes)} of memory`];
  if (found.queue_length) parts.push(`${plural(found.queue_length, "video")} ahead`);
  const seconds = (found.num_frames / found.fps).toFixed(1);
  const shape = `${sizeOf(found.size)}, ${plural(found.num_frames, "frame")}, ${seconds} s`;
  const lines = [element("strong", { textContent: shape }), parts.join(" \u00b7 ")];
  if (found.notes.length) {
    lines.push(element("ul", {}, ...found.notes.map((note) => element("li", { textContent: note }))));
  }
  return lines;
}

// Lines such as "17: zoom in" as pairs of a frame and a prompt; null where one is none.
function readLater(text) {
  const lines = text.split("\n").filter((line) => line.trim());
  const found = lines.map((line) => line.match(/^\s*(\d+)\s*:\s*(.*?)\s*$/));
  return found.every(Boolean) ? found.map(([, frame, prompt]) => [Number(frame), prompt]) : null;
}

export const writeLater = (pairs) =>
  pairs.map(([frame, prompt]) => `${frame}: ${prompt.replace(/\s+/g, " ")}`).join("\n");

function loraRow(name) {
  const box = element("input", { type: "checkbox" });
  const strength = element("input", { type: "number", step: "0.05", value: "1", inputMode: "decimal" });
  const stage = element("select", {}, new Option("Stage I", "stage1"), new Option("Stage II", "stage2"));
  strength.setAttribute("aria-label", `Strength of ${name}`);
  stage.setAttribute("aria-label", `Stage of ${name}`);
  const row = element("li", {}, element("label", {}, box, name), strength, stage);
  row.dataset.name = name;
  return row;
}

function loraParts(row) {
  return [find("[type=checkbox]", row), find("[type=number]", row), find("select", row)];
}

function readLora(row) {
  const [box, strength, stage] = loraParts(row);
  return box.checked && { name: row.dataset.name, strength: Number(strength.value || 1), stage: stage.value };
}

function writeLora(row, lora) {
  const [box, strength, stage] = loraParts(row);
  box.checked = Boolean(lora);
  strength.value = lora?.strength ?? 1;
  stage.value = lora?.stage ?? "stage1";
}
