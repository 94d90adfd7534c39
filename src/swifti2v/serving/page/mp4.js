// MP4 boxes: the codec of a stream, and the settings that are stored in a video.

const text = (view, start, length) =>
  new TextDecoder("latin1").decode(new Uint8Array(view.buffer, view.byteOffset + start, length));

// Boxes between two places of a DataView, as { kind, start, end } of their content.
function* boxes(view, start = 0, end = view.byteLength) {
  while (start + 8 <= end) {
    let size = view.getUint32(start);
    let head = 8;
    if (size === 1 && start + 16 <= end) {
      size = Number(view.getBigUint64(start + 8));
      head = 16;
    }
    if (size === 0) size = end - start;
    if (size < head) return;
    yield { kind: text(view, start + 4, 4), number: view.getUint32(start + 4),
      start: start + head, end: Math.min(end, start + size), next: start + size };
    start += size;
  }
}

function find(view, path, start, end) {
  const [kind, ...rest] = path;
  for (const box of boxes(view, start, end)) {
    if (box.kind !== kind) continue;
    const inner = box.start + (HEADS[kind] ?? 0);
    if (!rest.length) return { ...box, start: inner };
    const found = find(view, rest, inner, box.end);
    if (found) return found;
  }
  return null;
}

// Bytes of a box before the boxes in it: version and flags, and the fields of a video sample.
const HEADS = { stsd: 8, avc1: 78, avc3: 78, meta: 4 };

// The MIME type of the stream that begins with these bytes; null while too few are there.
export function streamType(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const moov = [...boxes(view)].find((box) => box.kind === "moov");
  if (!moov || moov.next > view.byteLength) return null;
  const avc = ["avc1", "avc3"].map((kind) =>
    find(view, ["trak", "mdia", "minf", "stbl", "stsd", kind, "avcC"], moov.start, moov.end))
    .find(Boolean);
  if (!avc) return "video/mp4";
  const levels = [1, 2, 3].map((place) => view.getUint8(avc.start + place));
  const codec = levels.map((level) => level.toString(16).padStart(2, "0")).join("");
  return `video/mp4; codecs="avc1.${codec}"`;
}

// The settings in a video, or null. `read(start, end)` gives some bytes of the file, fewer at its end.
export async function readSettings(read) {
  const moov = await readMoov(read);
  if (!moov) return null;
  const meta = find(moov, ["udta", "meta"]) ?? find(moov, ["meta"]);
  const keys = meta && find(moov, ["keys"], meta.start, meta.end);
  const list = meta && find(moov, ["ilst"], meta.start, meta.end);
  if (!list) return null;
  const number = keys ? commentNumber(moov, keys) : null;
  for (const item of boxes(moov, list.start, list.end)) {
    if (keys ? item.number !== number : item.kind !== "\xa9cmt") continue;
    const data = find(moov, ["data"], item.start, item.end);
    return data && parse(moov, data.start + 8, data.end);
  }
  return null;
}

async function readMoov(read) {
  for (let place = 0; ;) {
    const head = await read(place, place + 16);
    if (head.byteLength < 8) return null;
    const view = new DataView(head);
    let size = view.getUint32(0);
    if (size === 1 && head.byteLength === 16) size = Number(view.getBigUint64(8));
    if (size < 8) return null;
    if (text(view, 4, 4) === "moov") return new DataView(await read(place + 8, place + size));
    place += size;
  }
}

function commentNumber(view, keys) {
  let number = 0;
  for (const key of boxes(view, keys.start + 8, keys.end)) {
    number += 1;
    if (text(view, key.start, key.end - key.start) === "comment") return number;
  }
  return null;
}

function parse(view, start, end) {
  try {
    const bytes = new Uint8Array(view.buffer, view.byteOffset + start, end - start);
    const settings = JSON.parse(new TextDecoder().decode(bytes));
    return settings?.command ? settings : null;
  } catch {
    return null;
  }
}
