// Reads a file beside the page, so that the page stays responsive whatever the file holds.
import { FormatError, openMuws, plain } from "./muws.js";

const BATCH = 100; // tensors that are shown at a time
const LONGEST = 300; // characters of a text that are shown
const COLOURS = [[61, 90, 128], [244, 162, 89], [241, 243, 245]]; // dense, unified, pruned
const EXTRA = 20_000;
let file = null, maps = null, next = 0, name = "";

const cut = (text) => (text.length > LONGEST ? `${text.slice(0, LONGEST)} ...` : text);

function pixelsOf({ width, height, counts }) {
  const pixels = new Uint8ClampedArray(4 * width * height);
  for (let k = 0; k < width * height; k++) {
    const n = counts[3 * k] + counts[3 * k + 1] + counts[3 * k + 2];
    for (let c = 0; c < 3; c++) {
      let sum = 0;
      for (let kind = 0; kind < 3; kind++) sum += counts[3 * k + kind] * COLOURS[kind][c];
      pixels[4 * k + c] = sum / n; // rounds
    }
    pixels[4 * k + 3] = 255;
  }
  return pixels;
}

function stored(entry) {
  if (entry.sameAs !== null) return `${entry.isCopy ? "copy of" : "same as"} ${file.tensors[entry.sameAs].name}`;
  return entry.form ? entry.form.stored.replace("grid", "steps") : "bytes";
}

function rows() {
  const found = [], transfer = [];
  for (const entry of file.tensors.slice(next, next + BATCH)) {
    const row = {
      name: cut(entry.name), shape: entry.shape.join("x") || "scalar", dtype: entry.dtype, block: entry.block?.join("x") ?? "",
      counts: entry.block ? entry.counts : [], stored: cut(stored(entry)), error: entry.error,
    };
    if (entry.block && entry.grid[0] && entry.grid[1]) {
      const [, map] = maps.next().value;
      row.map = { width: map.width, height: map.height, cell: map.cell, grid: entry.grid, pixels: pixelsOf(map) };
      transfer.push(row.map.pixels.buffer);
    }
    found.push(row);
  }
  next += found.length;
  postMessage({ kind: "rows", rows: found, left: file.tensors.length - next }, transfer);
}

async function open(source) {
  let bytes;
  try {
    bytes = new Uint8Array(await source.arrayBuffer());
  } catch (error) {
    throw new FormatError(`this browser cannot read the file: ${error.message}`);
  }
  file = openMuws(bytes);
  [maps, next] = [file.maps(), 0];
  const extra = file.extra.size ? JSON.stringify(plain(file.extra), null, 1) : "";
  const { version, nBytes, denseBytes } = file, nWeights = file.tensors.reduce((n, t) => n + (t.sameAs === null ? t.numel : 0), 0);
  const streams = file.streams().slice(0, 1000).map((one) => ({ ...one, name: cut(one.name), coders: cut(one.coders) }));
  const about = { name, version, nBytes, denseBytes, nWeights, nTensors: file.tensors.length, streams };
  postMessage({ kind: "opened", about: { ...about, extra: extra.length > EXTRA ? `${extra.slice(0, EXTRA)} ...` : extra } });
  rows();
  await verify();
}

async function verify() {
  let done = 0, shown = performance.now();
  for (const [, bytes] of file.decode()) {
    done += bytes.length;
    if (performance.now() - shown > 100) {
      postMessage({ kind: "progress", done, total: file.denseBytes });
      await new Promise((resolve) => setTimeout(resolve)); // lets other messages in
      shown = performance.now();
    }
  }
  postMessage({ kind: "intact" });
}

function save() {
  const parts = file.safetensors((done, total) => postMessage({ kind: "progress", done, total }));
  postMessage({ kind: "saved", blob: new Blob(parts, { type: "application/octet-stream" }), name });
}

const ACTS = { open: ({ source }) => open(source), rows, save };

onmessage = async ({ data }) => {
  try {
    if (data.name !== undefined) ({ name } = data);
    await ACTS[data.act](data);
  } catch (error) {
    const isOpening = data.act === "open";
    postMessage({ kind: isOpening ? "refused" : "failed", message: cut(error.message), isFormat: error instanceof FormatError });
  }
};
