// Numbers and states in words.

export const find = (selector, root = document) => root.querySelector(selector);

// An element; `fields` are its properties.
export function element(tag, fields = {}, ...children) {
  const made = Object.assign(document.createElement(tag), fields);
  made.append(...children);
  return made;
}

export function duration(seconds) {
  if (seconds < 1) return "1 s";
  if (seconds < 60) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 90) return `${minutes} min`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

// A GB is 2^30 bytes, as memory is sold.
export function memory(bytes) {
  const [unit, size] = bytes >= 0.1 * 2 ** 30 ? ["GB", 2 ** 30] : ["MB", 2 ** 20];
  return `${(bytes / size).toFixed(1)}\u00a0${unit}`;
}

// Length as the form asks for it: the frames after the first one.
export const lengthOf = (numFrames, fps) => Number(((numFrames - 1) / fps).toFixed(3));

export const sizeOf = (size) => size.replace("x", "\u2009×\u2009");

export const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

export const isActive = (video) => video.status === "queued" || video.status === "in_progress";

const STAGES = {
  loading: "Loading the model",
  text: "Reading the prompt",
  stage1: "Stage I: planning the motion",
  reference: "Enlarging the motion",
  decode: "Decoding",
};

export function stateOf(video) {
  if (video.status === "queued") {
    const ahead = video.queue_position ?? 0;
    return ahead ? `Waiting, ${plural(ahead, "video")} ahead` : "Next in the queue";
  }
  if (video.status === "completed") return "Finished";
  if (video.status === "failed") return "Failed";
  if (video.status === "cancelled") return "Cancelled";
  if (video.stage !== "stage2") return STAGES[video.stage] ?? "Starting";
  const number = Math.min(video.segments_done + 1, video.segments_total);
  return `Stage II: segment ${number} of ${video.segments_total}`;
}

export function remaining(video) {
  return isActive(video) && video.eta_seconds != null ? `about ${duration(video.eta_seconds)} left` : "";
}

export const wantsCalm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
