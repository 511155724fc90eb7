// Reads files with the viewer's module, as node runs it: node read_muws.mjs OUT FILE...
// Writes OUT/<n>.safetensors for file n, and one line of JSON a file: {ok, error, kind, ms, maps}.
import { readFileSync, writeFileSync } from "node:fs";
import { FormatError, openMuws } from "../../lightning_muws/viewer/muws.js";

const [out, ...files] = process.argv.slice(2);
files.forEach((path, n) => {
  const bytes = new Uint8Array(readFileSync(path)), start = performance.now();
  const found = { ok: false };
  try {
    const file = openMuws(bytes);
    found.maps = {};
    for (const [entry, map] of file.maps()) found.maps[entry.name] = { ...map, counts: [...map.counts] };
    found.streams = file.streams();
    found.opened = performance.now() - start;
    const parts = file.safetensors();
    writeFileSync(`${out}/${n}.safetensors`, Buffer.concat(parts));
    found.ok = true;
  } catch (error) {
    found.error = error.message;
    found.kind = error instanceof FormatError ? "FormatError" : error.name;
    if (found.kind !== "FormatError") found.stack = error.stack;
  }
  found.ms = performance.now() - start;
  console.log(JSON.stringify(found));
});
