// Text files that go with a message: chosen, dropped or pasted.

import { byId, el, iconButton } from "./dom.js";
import { bytes, t } from "./i18n.js";
import { notify } from "./notice.js";

const LARGEST = 4_000_000; // bytes; the server takes bodies of 8 MiB

let files = [];
let changed = () => {};

/** Return the files, and forget them. */
export function takeFiles() {
  const taken = files;
  setFiles([]);
  return taken;
}

export const attachedFiles = () => files;

/** Read files and attach those that are text. */
export async function attach(chosen) {
  const read = await Promise.all([...chosen].map(readText));
  setFiles([...files, ...read.filter(Boolean)]);
}

/** Take files from the button, from a drop on `area`, and from the clipboard; tell `onchange`. */
export function startAttachments(area, draft, onchange) {
  changed = onchange;
  const input = byId("file-input");
  byId("attach").addEventListener("click", () => input.click());
  input.addEventListener("change", async () => {
    await attach(input.files);
    input.value = "";
  });
  area.addEventListener("dragover", (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    area.dataset.drop = t("dropFiles");
  });
  area.addEventListener("dragleave", (event) => {
    if (!area.contains(event.relatedTarget)) delete area.dataset.drop;
  });
  area.addEventListener("drop", (event) => {
    event.preventDefault();
    delete area.dataset.drop;
    attach(event.dataTransfer.files);
  });
  draft.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) attach(event.clipboardData.files);
  });
}

async function readText(file) {
  if (file.size > LARGEST) return notify(t("fileLarge", { name: file.name, size: bytes(LARGEST) }));
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    if (!text.includes("\0")) return { name: file.name, text };
  } catch {
    // It is not UTF-8.
  }
  return notify(t("fileBinary", { name: file.name }));
}

function setFiles(given) {
  files = given;
  byId("files").replaceChildren(...files.map((file) => el("li", {}, `${file.name} · ${bytes(file.text.length)}`,
    iconButton("close", `${t("remove")}: ${file.name}`, () => setFiles(files.filter((each) => each !== file))))));
  changed();
}
