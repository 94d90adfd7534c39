// The queue and the videos that are there, kept up to date.

import { cancelVideo, listVideos, mediaUrl } from "./api.js";
import { element, find, isActive, remaining, sizeOf, stateOf } from "./words.js";

export class Lists {
  // `onChoose(id)` is told of a click, `onError(error)` of failures.
  constructor({ onChoose, onError }) {
    Object.assign(this, { onChoose, onError, rows: new Map(), older: [], chosen: null });
    find("#older").addEventListener("click", () => this.showOlder());
  }

  // Ask the server; whether a job waits or runs.
  async refresh() {
    const page = await listVideos();
    const known = new Set(page.data.map((video) => video.id));
    this.older = this.older.filter((video) => !known.has(video.id));
    if (!this.older.length) this.hasMore = page.has_more;
    this.newest = page.data;
    this.draw();
    return page.data.some(isActive);
  }

  async showOlder() {
    try {
      const last = [...this.newest, ...this.older].at(-1);
      const page = await listVideos(last.id);
      this.older.push(...page.data);
      this.hasMore = page.has_more;
      this.draw();
    } catch (error) {
      this.onError(error);
    }
  }

  forget(id) {
    this.older = this.older.filter((video) => video.id !== id);
  }

  choose(id) {
    this.chosen = id;
    for (const [name, row] of this.rows) row.mark(name === id);
  }

  draw() {
    const all = [...this.newest, ...this.older];
    const waiting = all.filter(isActive).reverse(); // the next one first
    const ended = all.filter((video) => !isActive(video));
    this.place(find("#queue-list"), waiting, (video) => this.queueRow(video));
    this.place(find("#gallery-list"), ended, (video) => this.galleryRow(video));
    find("#queue").hidden = !waiting.length;
    find("#gallery").hidden = !ended.length;
    find("#older").hidden = !this.hasMore;
    const ids = new Set(all.map((video) => video.id));
    for (const id of this.rows.keys()) if (!ids.has(id)) this.rows.delete(id);
  }

  // Rows are made once and moved only when the order changed, so that the focus stays.
  place(list, videos, make) {
    const items = videos.map((video) => {
      let row = this.rows.get(video.id);
      if (row?.list !== list) {
        row = { ...make(video), list };
        this.rows.set(video.id, row);
        row.mark(video.id === this.chosen);
      }
      row.update(video);
      return row.item;
    });
    const isSame = items.length === list.children.length
      && items.every((item, place) => item === list.children[place]);
    if (!isSame) list.replaceChildren(...items);
  }

  queueRow({ id, prompt }) {
    const detail = element("span", { className: "detail" });
    const open = element("button", { type: "button", title: prompt },
      element("span", { className: "title", textContent: prompt }), detail);
    const cancel = element("button", { type: "button", className: "quiet", textContent: "Cancel" });
    cancel.setAttribute("aria-label", `Cancel: ${prompt}`);
    open.addEventListener("click", () => this.onChoose(id));
    cancel.addEventListener("click", () => this.cancel(id));
    return {
      item: element("li", {}, open, cancel),
      mark: (isChosen) => mark(open, isChosen),
      update: (video) => {
        const parts = [stateOf(video), video.progress ? `${video.progress} %` : "", remaining(video)];
        detail.textContent = parts.filter(Boolean).join(" \u00b7 ");
      },
    };
  }

  galleryRow({ id, prompt, status, segments_done: segments }) {
    const thumb = element("span", { className: "thumb", textContent: segments ? "" : stateOf({ status }) });
    const detail = element("span", { className: "detail" });
    const open = element("button", { type: "button", title: prompt }, thumb,
      element("span", { className: "words" },
        element("span", { className: "title", textContent: prompt }), detail));
    open.addEventListener("click", () => this.onChoose(id));
    if (segments) showThumbnail(id, thumb);
    return {
      item: element("li", {}, open),
      mark: (isChosen) => mark(open, isChosen),
      update: (video) => {
        detail.textContent = video.status === "completed"
          ? `${sizeOf(video.size)} \u00b7 ${Number(video.seconds).toFixed(1)} s` : stateOf(video);
      },
    };
  }

  async cancel(id) {
    try {
      await cancelVideo(id);
      await this.refresh();
    } catch (error) {
      this.onError(error);
    }
  }
}

function mark(button, isChosen) {
  if (isChosen) button.setAttribute("aria-current", "true");
  else button.removeAttribute("aria-current");
}

async function showThumbnail(id, place) {
  const image = element("img", { className: "thumb", alt: "" });
  image.addEventListener("load", () => place.replaceWith(image));
  image.addEventListener("error", () => place.replaceChildren("No picture"));
  image.src = await mediaUrl(`/v1/videos/${id}/content?variant=thumbnail`).catch(() => "");
}
