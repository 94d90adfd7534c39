// The page: its parts and what they tell each other.

import { getJson, hasKey, readRange, setKey, sleep } from "./api.js";
import { Composer, writeLater } from "./composer.js";
import { Lists } from "./lists.js";
import { readSettings } from "./mp4.js";
import { find, lengthOf } from "./words.js";
import { Viewer } from "./viewer.js";

const BUSY_SECONDS = 1;
const IDLE_SECONDS = 4;

// Photos that were sent from this page, by job: a video does not hold its photo.
const photos = new Map();
let next = new AbortController();

const composer = new Composer({
  onMade(video, photo) {
    photos.set(video.id, photo);
    choose(video.id);
    refreshSoon();
    if (matchMedia("(max-width: 60rem)").matches) find("#viewer").scrollIntoView({ block: "start" });
  },
  onError: report,
});
const lists = new Lists({
  onChoose(id) {
    choose(id);
    const { top } = find("#viewer").getBoundingClientRect();
    if (top < 0 || top > innerHeight / 2) find("#viewer").scrollIntoView({ block: "start" });
  },
  onError: report,
});
const viewer = new Viewer({
  onReuse: reuse,
  onChange(video) {
    if (!video) {
      lists.forget(lists.chosen);
      choose(null);
    }
    refreshSoon();
  },
  onError: report,
});

// The chosen job is in the address: it survives a reload, and back goes back.
function choose(id) {
  if (location.hash.slice(1) !== (id ?? "")) history.pushState(null, "", id ? `#${id}` : " ");
  showChosen();
}

function showChosen() {
  const id = location.hash.slice(1) || null;
  lists.choose(id);
  if (id) viewer.show(id, photos.get(id));
  else if (viewer.id) viewer.clear();
}

function report(error) {
  if (error.status === 401) return askForKey(error);
  if (error.status === 404) viewer.forget();
  else if (!error.isOffline) composer.showProblem(error.message);
  refreshSoon();
}

// The server's state and the lists, again and again; what is wrong is said at the top.
async function watch() {
  for (;;) {
    let isBusy = true;
    try {
      if (!composer.models.length) composer.setModels((await getJson("/v1/models")).data);
      isBusy = await lists.refresh();
      const health = await getJson("/health", { ok: [503] });
      tell(health.reason ? `Not working: ${health.reason}` : "", Boolean(health.reason));
    } catch (error) {
      if (error.status === 401) await askForKey(error);
      else tell(error.isOffline ? "The server does not answer. Trying again." : error.message, true);
    }
    do {
      next = new AbortController();
      await sleep(isBusy ? BUSY_SECONDS : IDLE_SECONDS, next.signal);
    } while (document.hidden);
  }
}

const refreshSoon = () => next.abort();

function tell(text, isBad) {
  const place = find("#server");
  if (place.textContent !== text) place.textContent = text;
  place.classList.toggle("is-bad", isBad);
}

function askForKey(error) {
  const dialog = find("#key-dialog");
  find("#key-problem").textContent = error.message;
  find("#key-problem").hidden = !hasKey();
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
}

find("#key-dialog form").addEventListener("submit", () => {
  setKey(find("#key").value.trim());
  find("#key").value = "";
  find("#forget-key").hidden = !hasKey();
  showChosen();
});
find("#key-dialog").addEventListener("cancel", (event) => event.preventDefault());
find("#forget-key").hidden = !hasKey();
find("#forget-key").addEventListener("click", () => { setKey(null); location.reload(); });

// Settings of a video of the server, or of a file; the form gets what it has fields for.
async function reuse(video) {
  const stored = video.status === "completed"
    ? await readSettings(readRange(video.id)).catch(() => null) : null;
  const { prompt, seed, model, size, fps, num_frames: frames } = video;
  const simple = { prompt, seed, model, size, fps, seconds: lengthOf(frames, fps) };
  composer.fill(stored ? { ...fromStored(stored), model } : simple, photos.get(video.id));
  if (!photos.has(video.id)) composer.ask("The settings are back. Choose their photo.", "input_reference");
  find("#prompt").focus();
}

async function reuseFile(file) {
  const read = (start, end) => file.slice(start, end).arrayBuffer();
  const stored = await readSettings(read).catch(() => null);
  if (!stored) {
    return composer.showProblem(
      `${file.name} carries no settings. To use its motion, choose it under More settings, Motion clip.`);
  }
  composer.fill(fromStored(stored));
  if (!composer.photo) composer.ask("The settings are back. Choose their photo.", "input_reference");
  else if (stored.motion) composer.ask("The settings are back. Choose their motion clip.", "motion_reference");
}

const stem = (path) => path.split(/[\\/]/).at(-1).replace(/\.(yaml|safetensors)$/, "");

function fromStored({ prompt, seed, model, fit, background, loras, truncate_prompt: isCut, config }) {
  const { stage1, stage2 } = config;
  const steps = stage2.sampling.num_inference_steps;
  const guidance = stage2.sampling.guidance_scale;
  return {
    prompt, seed, fit, background,
    model: stem(model),
    size: `${config.width}x${config.height}`,
    fps: config.fps,
    seconds: lengthOf(config.num_frames, config.fps),
    num_inference_steps: steps === stage1.sampling.num_inference_steps ? steps : "",
    guidance_scale: guidance === stage1.sampling.guidance_scale ? guidance : "",
    negative_prompt: config.negative_prompt,
    later_prompts: writeLater(config.later_prompts ?? []),
    truncate_prompt: isCut || "",
    segment_size: stage2.segment_size,
    context_size: stage2.context_size,
    loras: loras.map((lora) => ({ ...lora, name: stem(lora.path) })),
  };
}

// Files that are dropped or pasted anywhere.
function takeFiles(files, place) {
  const [file] = files;
  if (!file) return;
  if (!file.type.startsWith("video/")) composer.setPhoto(file);
  else if (place?.closest("[data-field=motion_reference]")) composer.setMotion(file);
  else reuseFile(file);
}

const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
addEventListener("dragover", (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  find("#drop-hint").hidden = false;
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) find("#drop-hint").hidden = true;
});
addEventListener("drop", (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  find("#drop-hint").hidden = true;
  takeFiles(event.dataTransfer.files, event.target);
});
addEventListener("paste", (event) => {
  if (!event.clipboardData.files.length) return;
  event.preventDefault();
  takeFiles(event.clipboardData.files);
});
find("#reuse-file").addEventListener("change", (event) => {
  if (event.target.files.length) reuseFile(event.target.files[0]);
  event.target.value = "";
});
addEventListener("popstate", showChosen);
document.addEventListener("visibilitychange", refreshSoon);

showChosen();
watch();
