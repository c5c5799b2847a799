// Code blocks: a name, a copy button, and colours, which come when the browser has time.

import { copyButton, el } from "./dom.js";
import { number, t } from "./i18n.js";
import { clean } from "./markdown.js";

const MOST_COLOURED = 60_000; // characters; more would stop the page for too long
const LINES = 100; // of a part of a long block, so that the browser lays out only the parts in sight
const LANGUAGES = {
  bash: "bash", c: "c", "c++": "cpp", cc: "cpp", cpp: "cpp", css: "css", diff: "diff", go: "go", golang: "go", h: "c",
  hpp: "cpp", html: "xml", ini: "ini", java: "java", javascript: "javascript", js: "javascript", json: "json",
  jsx: "javascript", markdown: "markdown", md: "markdown", mjs: "javascript", patch: "diff", py: "python",
  python: "python", python3: "python", rs: "rust", rust: "rust", sh: "bash", shell: "bash", sql: "sql", svg: "xml",
  toml: "ini", ts: "typescript", tsx: "typescript", typescript: "typescript", xml: "xml", yaml: "yaml", yml: "yaml", zsh: "bash",
};
const idle = globalThis.requestIdleCallback ?? ((act) => setTimeout(act, 50));

/** A code block whose text grows. */
export class CodeBlock {
  #code = el("code");
  #text = "";
  #part;
  #lines = 0;

  constructor(info) {
    this.language = info.trim().split(/[\s{,]/, 1)[0].toLowerCase();
    const name = el("span", { className: "code-name" }, this.language || "text");
    const copy = copyButton(() => this.#text, t("copyCode"), t("copied"));
    this.element = el("div", { className: "code-block" }, el("div", { className: "code-head" }, name, copy), el("pre", { tabIndex: 0 }, this.#code));
  }

  /** Show the whole text, which begins with what was shown before. */
  set(text) {
    for (const line of text.slice(this.#text.length).match(/[^\n]*\n|[^\n]+$/g) ?? []) {
      if (!this.#part || this.#lines >= LINES) {
        this.#part = new Text("");
        this.#lines = 0;
        this.#code.append(el("span", { className: "part" }, this.#part));
      }
      this.#part.appendData(line);
      if (line.endsWith("\n")) this.#lines += 1;
    }
    this.#text = text;
  }

  /** Colour the text, which is complete. */
  finish() {
    const grammar = LANGUAGES[this.language];
    if (this.#text.split("\n").length > LINES) {
      this.element.querySelector(".code-name").append(` · ${t("largeCode", { n: number(this.#text.split("\n").length) })}`);
    }
    if (grammar && this.#text.length <= MOST_COLOURED) idle(() => this.#colour(grammar));
  }

  async #colour(grammar) {
    const [{ default: highlight }, { default: language }] = await Promise.all([
      import("./vendor/highlight.js"),
      import(`./vendor/languages/${grammar}.js`),
    ]);
    if (!highlight.getLanguage(grammar)) highlight.registerLanguage(grammar, language);
    this.#code.replaceChildren(clean(highlight.highlight(this.#text, { language: grammar, ignoreIllegals: true }).value));
  }
}

/** Return a finished block. */
export function codeBlock(text, info) {
  const block = new CodeBlock(info);
  block.set(text);
  block.finish();
  return block.element;
}

/** Replace the plain code blocks in a fragment, such as those of lists. */
export function dressCode(fragment, { finished }) {
  for (const code of fragment.querySelectorAll("pre > code")) {
    const info = /language-(\S+)/.exec(code.className)?.[1] ?? "";
    const block = new CodeBlock(info);
    block.set(code.textContent);
    if (finished) block.finish();
    code.parentElement.replaceWith(block.element);
  }
  return fragment;
}
