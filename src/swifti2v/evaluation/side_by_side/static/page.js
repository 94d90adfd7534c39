"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const find = (selector) => document.querySelector(selector);
const panes = [...document.querySelectorAll(".pane")];
const [left, right] = panes.map((pane) => pane.querySelector("video"));
const videos = [left, right];
const MAX_ZOOM = 32;
const state = { index: 0, isPlaying: true, shownAt: 0, zoom: 1, x: 0, y: 0, isLoading: true };

// Results of this browser and page. Without storage they last until the page is closed.
const storageKey = `swifti2v-compare-${data.page}`;

function loadResult() {
  try {
    const stored = JSON.parse(localStorage.getItem(storageKey));
    if (stored) return stored;
  } catch {
    say("This browser keeps nothing: save the result before you close the page.");
  }
  const bytes = crypto.getRandomValues(new Uint8Array(8));
  const viewer = [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return { viewer, votes: {} };
}

function keepResult() {
  try {
    localStorage.setItem(storageKey, JSON.stringify(result));
  } catch {
    say("This browser keeps nothing: save the result before you close the page.");
  }
}

function say(text) {
  find("#message").textContent = text;
  find("#message").hidden = !text;
}

const result = loadResult();
const pair = () => data.pairs[state.index];
const firstOpen = () => data.pairs.findIndex((item) => !result.votes[item.name]);

function show(index) {
  state.index = index;
  state.isLoading = true;
  state.isPlaying = true;
  state.shownAt = performance.now();
  reset();
  find("#compare").hidden = false;
  find("#result").hidden = true;
  const voted = result.votes[pair().name];
  const side = voted && (voted.vote === "tie" ? "tie" : voted.vote === voted.left ? "left" : "right");
  for (const button of document.querySelectorAll("[data-vote]")) {
    button.classList.toggle("is-chosen", button.dataset.vote === side);
  }
  const done = Object.keys(result.votes).length;
  find("#progress").textContent = `Pair ${index + 1} of ${data.pairs.length}, ${done} voted on`;
  videos.forEach((video, place) => {
    video.src = pair().files[place];
    video.load();
  });
}

// Playing in step: the left video leads; the right one follows by its rate, or by a jump.
async function seek(seconds) {
  await Promise.all(videos.map((video) => new Promise((resolve) => {
    video.addEventListener("seeked", resolve, { once: true });
    video.currentTime = seconds;
  })));
}

function play() {
  state.isPlaying = true;
  right.playbackRate = left.playbackRate = 1;
  for (const video of videos) video.play().catch(() => { state.isPlaying = false; });
}

function pause() {
  state.isPlaying = false;
  for (const video of videos) video.pause();
}

async function restart() {
  pause();
  await seek(0);
  play();
}

const frameTime = (frame) => (frame + 0.5) / pair().fps;
const currentFrame = () =>
  Math.min(pair().num_frames - 1, Math.floor(left.currentTime * pair().fps + 1e-3));

function stepFrame(step) {
  pause();
  const frame = Math.min(pair().num_frames - 1, Math.max(0, currentFrame() + step));
  seek(frameTime(frame));
}

function keepInStep() {
  if (!state.isLoading && !find("#compare").hidden) {
    find("#frame").textContent = `frame ${currentFrame() + 1} of ${pair().num_frames}`;
    find("#play").firstChild.textContent = state.isPlaying ? "Pause " : "Play ";
    if (state.isPlaying && !videos.some((video) => video.seeking || video.ended)) {
      const ahead = (right.currentTime - left.currentTime) * pair().fps;
      if (Math.abs(ahead) > 3) right.currentTime = left.currentTime;
      right.playbackRate = Math.abs(ahead) < 0.25 ? 1 : ahead > 0 ? 0.92 : 1.08;
    }
  }
  requestAnimationFrame(keepInStep);
}

for (const video of videos) {
  video.addEventListener("canplaythrough", () => {
    if (state.isLoading && videos.every((one) => one.readyState >= 4)) {
      state.isLoading = false;
      play();
    }
  });
  video.addEventListener("ended", () => { if (state.isPlaying) restart(); });
  video.addEventListener("error", () => say(`This browser cannot play ${video.src}.`));
}

// Zoom and place are the same for both panes, as parts of a pane's size.
function place() {
  const rest = 1 - state.zoom;
  state.x = Math.min(0, Math.max(rest, state.x));
  state.y = Math.min(0, Math.max(rest, state.y));
  for (const video of videos) {
    video.style.transform =
      `translate(${100 * state.x}%, ${100 * state.y}%) scale(${state.zoom})`;
  }
  find(".panes").classList.toggle("is-close", state.zoom > fittedZoom() * 1.5);
}

function reset() {
  Object.assign(state, { zoom: 1, x: 0, y: 0 });
  place();
}

// The zoom at which one pixel of the video is one pixel of the screen.
function fittedZoom() {
  const { clientWidth, clientHeight } = panes[0];
  const fit = Math.min(clientWidth / pair().width, clientHeight / pair().height);
  return 1 / (fit * devicePixelRatio);
}

function zoomTo(zoom, x = 0.5, y = 0.5) {
  const next = Math.min(MAX_ZOOM, Math.max(1, zoom));
  state.x = x - (x - state.x) * next / state.zoom;
  state.y = y - (y - state.y) * next / state.zoom;
  state.zoom = next;
  place();
}

for (const pane of panes) {
  pane.addEventListener("wheel", (event) => {
    event.preventDefault();
    const box = pane.getBoundingClientRect();
    const factor = Math.exp(-event.deltaY * 0.002);
    zoomTo(state.zoom * factor,
      (event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
  }, { passive: false });
  pane.addEventListener("pointerdown", (event) => pane.setPointerCapture(event.pointerId));
  pane.addEventListener("pointermove", (event) => {
    if (!pane.hasPointerCapture(event.pointerId)) return;
    state.x += event.movementX / pane.clientWidth;
    state.y += event.movementY / pane.clientHeight;
    place();
  });
}

function vote(side) {
  if (state.isLoading) return;
  const other = pair().left === "first" ? "second" : "first";
  result.votes[pair().name] = {
    pair: pair().name,
    vote: side === "tie" ? "tie" : side === "left" ? pair().left : other,
    left: pair().left,
    seconds: Math.round(performance.now() - state.shownAt) / 1000,
  };
  keepResult();
  const next = firstOpen();
  if (next < 0) finish();
  else show(next);
}

function finish() {
  pause();
  find("#compare").hidden = true;
  find("#result").hidden = false;
  const votes = data.pairs.map((item) => result.votes[item.name]);
  const count = (choice) => votes.filter((item) => item.vote === choice).length;
  const [first, second] = data.names;
  find("#summary").textContent =
    `${first}: ${count("first")}, ${second}: ${count("second")}, no difference: ${count("tie")}`;
  const nameOf = { first, second, tie: "no difference" };
  find("#rows").replaceChildren(...data.pairs.map((item, index) => {
    const other = item.left === "first" ? "second" : "first";
    const cells = [item.name, nameOf[item.left], nameOf[other], nameOf[votes[index].vote]];
    const row = document.createElement("tr");
    row.append(...cells.map((text) => {
      const cell = document.createElement("td");
      cell.textContent = text;
      return cell;
    }));
    return row;
  }));
}

function exported() {
  const votes = data.pairs.map((item) => result.votes[item.name]).filter(Boolean);
  return {
    format: data.format,
    page: data.page,
    viewer: result.viewer,
    names: data.names,
    num_pairs: data.pairs.length,
    votes,
  };
}

function save() {
  const link = document.createElement("a");
  const text = JSON.stringify(exported(), null, 1);
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = `compare-${data.page}-${result.viewer}.json`;
  link.click();
  URL.revokeObjectURL(link.href);
}

const actions = {
  ArrowLeft: () => vote("left"),
  ArrowRight: () => vote("right"),
  ArrowDown: () => vote("tie"),
  " ": () => (state.isPlaying ? pause() : play()),
  r: restart,
  ",": () => stepFrame(-1),
  ".": () => stepFrame(1),
  1: () => zoomTo(fittedZoom()),
  0: reset,
  Backspace: () => { if (state.index > 0) show(state.index - 1); },
};
const buttons = {
  play: " ", restart: "r", backward: ",", forward: ".", pixels: "1", whole: "0", back: "Backspace",
};
for (const [id, key] of Object.entries(buttons)) find(`#${id}`).addEventListener("click", actions[key]);
for (const button of document.querySelectorAll("[data-vote]")) {
  button.addEventListener("click", () => vote(button.dataset.vote));
}
for (const id of ["#export", "#export-open"]) find(id).addEventListener("click", save);
addEventListener("keydown", (event) => {
  const isMeant = !event.ctrlKey && !event.metaKey && !event.altKey && !event.repeat;
  if (find("#compare").hidden || !isMeant || !actions[event.key]) return;
  event.preventDefault();
  actions[event.key]();
});
addEventListener("resize", place);

if (firstOpen() < 0) finish();
else show(firstOpen());
keepInStep();
