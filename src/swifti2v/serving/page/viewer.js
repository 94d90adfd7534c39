// One job, followed from the queue to the finished video.

import { cancelVideo, deleteVideo, events, mediaUrl, sleep } from "./api.js";
import { canPlayLive, playLive } from "./live.js";
import { duration, element, find, isActive, memory, remaining, sizeOf, stateOf, wantsCalm } from "./words.js";

const RETRY_SECONDS = 1;

export class Viewer {
  // `onReuse(video)` and `onChange(video)` are told of clicks and of new states; `onError(error)` of failures.
  constructor({ onReuse, onChange, onError }) {
    Object.assign(this, { onReuse, onChange, onError, id: null, video: null, lastEvent: null });
    this.screen = find("#screen");
    this.player = find("#video");
    this.preview = find("#preview");
    this.download = find("#download");
    find("#cancel").addEventListener("click", () => this.act(() => cancelVideo(this.id)));
    find("#delete").addEventListener("click", () => this.remove());
    find("#reuse").addEventListener("click", () => this.onReuse(this.video));
    document.addEventListener("visibilitychange", () => {
      // Browsers open six connections to a server: a page that nobody sees holds none.
      if (document.hidden) this.following?.abort();
      else if (this.id && this.download.hidden) this.follow();
    });
  }

  // Show a job, with the photo that it was sent with if this page has it.
  show(id, photo) {
    if (id === this.id) return;
    this.clear();
    this.id = id;
    if (photo) this.showPicture(URL.createObjectURL(photo), "Your photo");
    this.follow();
  }

  clear() {
    this.following?.abort();
    this.id = this.video = null;
    this.lastEvent = null;
    this.player.removeAttribute("src");
    this.player.removeAttribute("poster");
    this.player.load();
    this.player.hidden = this.preview.hidden = true;
    find("#empty").hidden = false;
    find("#empty").textContent = "The video plays here while it is made.";
    find("#about").hidden = true;
    find("#strip").replaceChildren();
    this.screen.style.aspectRatio = "";
  }

  // Previews, progress and the stream of a job until it has ended, and then its video.
  async follow() {
    this.following?.abort();
    const { signal } = (this.following = new AbortController());
    const { id } = this;
    this.isStreaming = false;
    while (!signal.aborted) {
      try {
        const source = events(`/v1/videos/${id}/events`, { lastId: this.lastEvent, signal });
        for await (const { id: number, event, data } of source) {
          if (signal.aborted) return;
          if (number) this.lastEvent = number;
          if (event === "preview") this.addPreview(data);
          else if (!data) return this.forget();
          else this.take(data);
          if (event === "done") return await this.finish(data, signal);
          if (isActive(this.video)) this.stream(signal);
        }
      } catch (error) {
        if (signal.aborted) return;
        if (error.status === 404) return this.forget();
        if (error.status > 0) return this.onError(error);
      }
      await sleep(RETRY_SECONDS, signal); // the server is gone for a moment, or starts again
    }
  }

  // Play the segments that are there, and each further one.
  stream(signal) {
    if (this.isStreaming || !canPlayLive || !this.video.segments_done) return;
    this.isStreaming = true;
    const live = (this.live = new AbortController());
    signal.addEventListener("abort", () => live.abort());
    this.player.addEventListener("loadeddata", () => this.showPlayer(), { once: true, signal: live.signal });
    playLive(this.player, this.video, live.signal).catch((error) => {
      if (live.signal.aborted) return;
      this.player.hidden = true; // the previews go on
      console.warn(error);
    });
  }

  // What the job made, as a plain file; the place where it plays now is kept.
  async finish(video, signal) {
    if (!video.segments_done) return;
    const path = `/v1/videos/${video.id}/content`;
    const { isStreaming, player } = this;
    const isPlaying = isStreaming ? !player.paused : !wantsCalm();
    if (!isStreaming) player.poster = await mediaUrl(`${path}?variant=thumbnail`);
    const url = await mediaUrl(path);
    if (signal.aborted) return;
    const place = isStreaming ? player.currentTime : 0;
    this.live?.abort();
    player.disableRemotePlayback = false;
    player.addEventListener("loadedmetadata", () => {
      this.showPlayer();
      player.currentTime = place;
      if (isPlaying) player.play().catch(() => {});
    }, { once: true, signal });
    player.addEventListener("error", () => this.showNoVideo(), { once: true, signal });
    player.src = url;
    Object.assign(this.download, { href: url, download: `${video.id}.mp4`, hidden: false });
    this.download.textContent = video.status === "completed" ? "Download" : "Download what is finished";
  }

  showNoVideo() {
    this.player.hidden = this.preview.hidden = true;
    find("#empty").hidden = false;
    find("#empty").textContent = "This browser cannot play the video. Download it.";
  }

  showPlayer() {
    this.player.hidden = false;
    this.preview.hidden = find("#empty").hidden = true;
  }

  showPicture(url, alt) {
    this.preview.onload = () => { find("#empty").hidden = true; };
    this.preview.onerror = () => { this.preview.hidden = true; };
    Object.assign(this.preview, { src: url, alt, hidden: false });
  }

  addPreview({ name, segment, image }) {
    if (this.player.hidden) {
      this.showPicture(image, name === "stage1" ? "Four frames of the planned motion" : "The newest finished frame");
    }
    find("#strip").children[segment]?.replaceChildren(element("img", { src: image, alt: "" }));
  }

  // Show a state of the job.
  take(video) {
    const before = this.video;
    this.video = video;
    const active = isActive(video);
    if (before?.id !== video.id) this.begin(video);
    find("#state").textContent = stateOf(video);
    find("#remaining").textContent = remaining(video);
    find("#cancel").hidden = find("#progress").hidden = !active;
    find("#progress").value = video.progress;
    [...find("#strip").children].forEach((cell, number) => {
      cell.classList.toggle("is-now", video.status === "in_progress" && number === video.segments_done);
    });
    find("#strip").hidden = !active && !video.segments_done;
    find("#failure").hidden = !video.error;
    find("#failure").textContent = video.error?.message ?? "";
    find("#facts").textContent = facts(video).join(" \u00b7 ");
    find("#empty").textContent = active ? stateOf(video) : "Nothing of it was finished.";
    if (before?.id !== video.id || stateOf(before) !== stateOf(video)) {
      find("#news").textContent = stateOf(video);
      this.onChange(video);
    }
  }

  begin(video) {
    find("#about").hidden = false;
    this.download.hidden = true;
    find("#shown-prompt").textContent = video.prompt;
    this.screen.style.aspectRatio = video.size.replace("x", " / ");
    const cells = Array.from({ length: video.segments_total }, () => element("li"));
    find("#strip").replaceChildren(...cells);
    find("#notes").replaceChildren(...video.notes.map((note) => element("li", { textContent: note })));
  }

  async act(action) {
    try {
      this.take(await action());
    } catch (error) {
      this.onError(error);
    }
  }

  async remove() {
    if (!confirm("Delete this video for good?")) return;
    try {
      await deleteVideo(this.id);
      this.forget();
    } catch (error) {
      this.onError(error);
    }
  }

  forget() {
    this.clear();
    find("#empty").textContent = "This video is gone.";
    this.onChange(null);
  }
}

function facts(video) {
  const spent = video.stage_seconds.total;
  return [
    sizeOf(video.size),
    `${video.num_frames} frames at ${+video.fps.toFixed(3)} fps`,
    `seed ${video.seed}`,
    video.model,
    !isActive(video) && spent ? `made in ${duration(spent)}` : null,
    video.peak_memory_bytes ? `${memory(video.peak_memory_bytes)} of memory` : null,
  ].filter(Boolean);
}
