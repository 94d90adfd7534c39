// Plays a video while it is made: fragmented MP4 into a MediaSource.

import { call, pieces, sleep } from "./api.js";
import { streamType } from "./mp4.js";
import { wantsCalm } from "./words.js";

const RETRY_SECONDS = 1;
const LOOP_SECONDS = 1; // a part shorter than this would flicker

// iPhones have only the managed kind.
const Source = self.ManagedMediaSource ?? self.MediaSource;

export const canPlayLive = Boolean(Source);

// Feed a <video> until the job has ended or `signal` aborts. Of a connection that breaks, the next one
// skips what is here already: the server sends the same bytes again.
export async function playLive(element, video, signal) {
  const source = new Source();
  element.disableRemotePlayback = true; // a managed source opens only without AirPlay
  const url = URL.createObjectURL(source);
  element.src = url;
  signal.addEventListener("abort", () => URL.revokeObjectURL(url), { once: true });
  if (!wantsCalm()) loopWhatIsThere(element, signal);
  await opened(source, signal);
  const feed = new Feed(source, video);
  let numSeen = 0;
  let hasBegun = false;
  while (!signal.aborted) {
    try {
      const response = await call(`/v1/videos/${video.id}/stream`, { signal });
      let place = 0;
      for await (const piece of pieces(response.body)) {
        const fresh = piece.subarray(Math.max(0, Math.min(piece.length, numSeen - place)));
        place += piece.length;
        if (!fresh.length) continue;
        numSeen += fresh.length;
        await feed.add(fresh);
        if (!hasBegun && feed.buffer && !wantsCalm()) {
          hasBegun = true;
          element.play().catch(() => {});
        }
      }
      return feed.end();
    } catch (error) {
      if (signal.aborted || error.status === 404) return;
      if (error.name === "QuotaExceededError") return; // the rest plays when all is finished
      if (!error.isOffline && error.name !== "TypeError") throw error;
      await sleep(RETRY_SECONDS, signal);
    }
  }
}

class Feed {
  constructor(source, video) {
    this.source = source;
    this.seconds = video.num_frames / video.fps;
    this.head = new Uint8Array();
  }

  async add(bytes) {
    if (this.buffer) return this.append(bytes);
    this.head = joined(this.head, bytes);
    const type = streamType(this.head);
    if (!type) return;
    this.buffer = this.source.addSourceBuffer(type);
    await this.append(this.head);
    if (!(this.source.duration > this.seconds)) this.source.duration = this.seconds;
  }

  append(bytes) {
    return new Promise((resolve, reject) => {
      this.buffer.addEventListener("updateend", resolve, { once: true });
      this.buffer.addEventListener("error", () => reject(new Error("not playable")), { once: true });
      this.buffer.appendBuffer(bytes);
    });
  }

  end() {
    if (this.source.readyState === "open" && this.buffer) this.source.endOfStream();
  }
}

function loopWhatIsThere(element, signal) {
  const restart = () => {
    const { buffered } = element;
    const end = buffered.length ? buffered.end(buffered.length - 1) : 0;
    if (end >= LOOP_SECONDS && element.currentTime > end - 0.3) element.currentTime = 0;
  };
  element.addEventListener("waiting", restart, { signal });
}

function opened(source, signal) {
  return new Promise((resolve) => {
    source.addEventListener("sourceopen", resolve, { once: true });
    signal.addEventListener("abort", resolve, { once: true });
  });
}

function joined(first, second) {
  const both = new Uint8Array(first.length + second.length);
  both.set(first);
  both.set(second, first.length);
  return both;
}
