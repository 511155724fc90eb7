// The page: hands a file to the worker and shows what comes back. All texts are set as text, never as markup.
const $ = (id) => document.getElementById(id);
const PIXELS = 288; // of the longer side of a map, about
let worker = null;

// Control characters and marks that turn the direction of text are shown as escapes: a file may hold any name.
const visible = (text) =>
  text.replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (c) => `\\u{${c.codePointAt(0).toString(16)}}`);

function element(tag, text = "", className = "") {
  const found = document.createElement(tag);
  found.textContent = visible(text);
  found.className = className;
  return found;
}

function say(text, isRefused = false) {
  $("status").textContent = visible(text);
  $("status").classList.toggle("refused", isRefused);
}

function clear() {
  for (const id of ["facts", "maps", "rows", "streams", "extra", "name"]) $(id).replaceChildren();
  for (const id of ["shown", "more", "extras"]) $(id).hidden = true;
  $("save").disabled = true;
}

function read(source, name) {
  worker?.terminate();
  clear();
  say(`Reading ${name} ...`);
  worker = new Worker("worker.js", { type: "module" });
  worker.onmessage = ({ data }) => SHOW[data.kind](data);
  worker.onerror = (event) => SHOW.refused({ message: `this browser cannot run the reader: ${event.message ?? "no worker"}` });
  worker.postMessage({ act: "open", source, name });
}

const number = (n) => n.toLocaleString("en");

const SHOW = {
  opened({ about }) {
    $("name").textContent = visible(about.name);
    const facts = [
      [number(about.nBytes), "bytes"], [(about.denseBytes / about.nBytes).toFixed(2), "times smaller than its tensors"],
      [((8 * about.nBytes) / Math.max(1, about.nWeights)).toFixed(2), "bits a weight"], [number(about.nTensors), "tensors"],
      [about.version, "format"],
    ];
    for (const [value, what] of facts) {
      const box = element("div");
      box.append(element("b", value), what);
      $("facts").append(box);
    }
    for (const { name, bytes, coders } of about.streams) {
      const row = element("tr"), share = `${((100 * bytes) / about.nBytes).toFixed(1)} %`;
      row.append(element("td", name), element("td", number(bytes), "n"), element("td", share, "n"), element("td", coders));
      $("streams").append(row);
    }
    $("extra").textContent = about.extra.replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, (c) => (c === "\n" ? c : visible(c)));
    $("extras").hidden = !about.extra;
    $("shown").hidden = false;
    say("Checking every stream ...");
  },

  rows({ rows, left }) {
    for (const row of rows) {
      const { name, shape, dtype, block, counts, stored, error, map } = row, line = element("tr");
      line.append(element("td", name), element("td", shape), element("td", dtype), element("td", block));
      for (let kind = 0; kind < 3; kind++) line.append(element("td", counts.length ? number(counts[kind]) : "", "n"));
      line.append(element("td", stored), element("td", error ? error.toPrecision(3) : "", "n"));
      $("rows").append(line);
      if (map) $("maps").append(figure(row, map));
    }
    $("more").hidden = !left;
    $("more").textContent = `Show more: ${number(left)} tensors are left`;
    $("more").disabled = false;
  },

  progress({ done, total }) {
    say(`Decoding ... ${Math.floor((100 * done) / Math.max(1, total))} %`);
  },

  intact() {
    say("Intact: every stream was decoded and fits its checksum.");
    $("save").disabled = false;
  },

  refused({ message }) {
    worker.terminate();
    clear();
    say(`Refused: ${message}`, true);
  },

  failed({ message }) {
    say(message, true);
    $("save").disabled = false;
  },

  saved({ blob, name }) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = `${name.replace(/\.muws$/i, "")}.safetensors`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
    say(`Saved ${number(blob.size)} bytes.`);
    $("save").disabled = false;
  },
};

function figure({ name, shape, block }, { width, height, cell, grid, pixels }) {
  const found = element("figure"), canvas = document.createElement("canvas"), caption = element("figcaption");
  [canvas.width, canvas.height] = [width, height];
  canvas.getContext("2d").putImageData(new ImageData(pixels, width, height), 0, 0);
  const longest = Math.max(width, height), scale = longest > PIXELS ? PIXELS / longest : Math.max(1, Math.floor(PIXELS / longest));
  canvas.style.width = `${Math.max(2, scale * width)}px`;
  canvas.style.height = `${Math.max(2, scale * height)}px`;
  const note = cell[0] * cell[1] > 1 ? `, a pixel is ${cell[0]} x ${cell[1]} blocks` : "";
  const about = `${shape} in blocks of ${block}: ${number(grid[0])} x ${number(grid[1])} blocks${note}`;
  caption.append(element("b", name), document.createElement("br"), about);
  found.append(canvas, caption);
  return found;
}

$("file").addEventListener("change", ({ target }) => {
  if (target.files[0]) read(target.files[0], target.files[0].name);
  target.value = "";
});
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragenter" || kind === "dragover");
  });
}
addEventListener("drop", ({ dataTransfer }) => {
  const [found] = dataTransfer.files;
  if (found) read(found, found.name);
});
$("more").addEventListener("click", () => {
  $("more").disabled = true;
  worker.postMessage({ act: "rows" });
});
$("save").addEventListener("click", () => {
  $("save").disabled = true;
  worker.postMessage({ act: "save" });
});

// `muws view` serves the file beside the page, and puts its name behind the #.
async function readServed(name) {
  say(`Loading ${name} ...`);
  try {
    const answer = await fetch("file");
    if (!answer.ok) throw new Error(`${answer.status}`);
    read(await answer.blob(), name);
  } catch (error) {
    say(`${name} cannot be loaded (${error.message}): drop it here`, true);
  }
}
if (location.hash.length > 1) readServed(decodeURIComponent(location.hash.slice(1)));
