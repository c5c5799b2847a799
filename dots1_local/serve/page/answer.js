// A Markdown text that grows while the model writes it.
//
// A block is drawn once when it is finished; only the last block is drawn again when it grows. A
// block that is longer than a window is cut, so that the work of a step has a limit, whatever the
// model writes. After some steps the browser gets its turn, and while the answer grows, drawing takes
// at most a fifth of the time.

import { CodeBlock, codeBlock, dressCode } from "./code_block.js";
import { blocksOf, renderBlocks } from "./markdown.js";

const WINDOW = 8_000; // characters
const TABLE = 64_000; // characters of a table, which would not be one any more if it were cut
const LONG_LINE = 1_000; // characters; parsing takes the square of them in the worst case
const STEPS = 25; // milliseconds
const FRAME = 16; // milliseconds
const FENCE = /^ {0,3}(`{3,}(?=[^`\n]*(?:\n|$))|~{3,})([^\n]*)(?:\n|$)/;

export class Answer {
  #text = "";
  #done = 0; // characters of the blocks that are finished
  #last = []; // nodes of the block that grows
  #code; // the code block that grows, and where its text starts
  #timer;
  #rested = 0; // when the next drawing may begin

  constructor(root) {
    this.root = root;
  }

  /** Show a text, which begins with what was shown before, as soon as there is time. */
  grow(text) {
    this.#text = withoutReturns(text);
    this.#timer ??= setTimeout(() => this.#drawInTime(), Math.max(FRAME, this.#rested - performance.now()));
  }

  /** Show the whole text; what takes long is shown later. Call `done` at the end. */
  finish(text, done = () => {}) {
    this.#text = withoutReturns(text);
    clearTimeout(this.#timer);
    if (this.#draw(true)) this.#timer = setTimeout(() => this.finish(text, done));
    else done();
  }

  #drawInTime() {
    this.#timer = undefined;
    const begun = performance.now();
    const more = this.#draw(false);
    const now = performance.now();
    this.#rested = now + 4 * (now - begun);
    if (more) this.grow(this.#text);
  }

  /** Draw for some time; return whether there is more. */
  #draw(final) {
    const end = performance.now() + STEPS;
    while (this.#done < this.#text.length) {
      if (!this.#drawNext(final)) return false;
      if (performance.now() > end) return true;
    }
    return false;
  }

  /** Draw what comes next; return whether something was finished. */
  #drawNext(final) {
    let rest = this.#text.slice(this.#done, this.#done + WINDOW);
    const fence = this.#code ?? openingFence(rest, this.#done, final);
    if (fence) return this.#drawCode(fence, final);
    let blocks = blocksOf(rest);
    if (rest.length >= WINDOW && blocks[0]?.type === "table") {
      const table = this.#text.slice(this.#done, this.#done + TABLE);
      if (Math.max(...table.split("\n").map((line) => line.length)) < LONG_LINE) {
        rest = table;
        blocks = blocksOf(rest);
      }
    }
    const whole = final && this.#done + rest.length === this.#text.length;
    const count = whole ? beforeFence(blocks) : finishedBlocks(blocks);
    if (count) return this.#append(blocks.slice(0, count));
    if (rest.length >= WINDOW) return this.#append(blocksOf(cut(rest)));
    this.#replaceLast(dressCode(renderBlocks(blocks), { finished: false }), { grows: true });
    return false;
  }

  #append(blocks) {
    this.#replaceLast(dressCode(renderBlocks(blocks), { finished: true }));
    this.#done += Math.max(1, blocks.reduce((sum, block) => sum + block.raw.length, 0));
    return true;
  }

  /** Replace the block that grows, by one that is finished or `grows`, too. */
  #replaceLast(fragment, { grows = false } = {}) {
    const old = this.#last;
    this.#last = grows ? [...fragment.childNodes] : [];
    this.root.append(fragment);
    for (const node of old) node.remove(); // last, so that the page never becomes shorter and jumps
  }

  /** Draw a fenced code block, which ends with its fence, or with the text if that is final. */
  #drawCode(fence, final) {
    const end = closingFence(this.#text, fence, final);
    if (!end && !final) {
      if (!this.#code) {
        this.#code = { ...fence, block: new CodeBlock(fence.info) };
        this.#replaceLast(fragmentOf(this.#code.block.element), { grows: true });
      }
      this.#code.from = this.#text.lastIndexOf("\n") + 1; // the last line may become the fence
      this.#code.block.set(this.#text.slice(fence.start, Math.max(fence.start, this.#code.from)));
      return false;
    }
    const text = this.#text.slice(fence.start, end ? end.index : this.#text.length);
    if (this.#code) {
      this.#code.block.set(text);
      this.#code.block.finish();
      this.#last = [];
      this.#code = undefined;
    } else {
      this.#replaceLast(fragmentOf(codeBlock(text, fence.info)));
    }
    this.#done = end ? end.index + end.length : this.#text.length;
    return true;
  }
}

function fragmentOf(element) {
  const fragment = new DocumentFragment();
  fragment.append(element);
  return fragment;
}

/** Return the fence that a text begins with; positions count from the beginning of the answer. */
function openingFence(text, offset, final) {
  const match = FENCE.exec(text);
  if (!match || !(final || match[0].endsWith("\n"))) return undefined;
  const start = offset + match[0].length;
  return { mark: match[1], info: match[2], start, from: start };
}

/** Return where the closing fence is, and its length; its line must be whole, or the last one. */
function closingFence(text, { mark, start, from }, final) {
  const pattern = new RegExp(`^ {0,3}${mark[0]}{${mark.length},}[ \\t]*(?:\\n${final ? "|$(?![^])" : ""})`, "gm");
  pattern.lastIndex = Math.max(start, from);
  const match = pattern.exec(text);
  return match && { index: match.index, length: match[0].length };
}

/** Return how many blocks come before a fence that is not the first one, which is drawn by itself. */
function beforeFence(blocks) {
  const fence = blocks.findIndex((block) => block.type === "code" && FENCE.test(block.raw));
  return fence > 0 ? fence : blocks.length;
}

/** Return how many blocks cannot change any more: those before the last one that is not space. */
function finishedBlocks(blocks) {
  const last = blocks.findLastIndex((block) => block.type !== "space");
  return last > 0 ? Math.min(last, beforeFence(blocks)) : 0;
}

/** Return the whole lines of a text, or if it has but one, the whole characters. */
function cut(text) {
  const lines = text.slice(0, text.lastIndexOf("\n") + 1);
  return lines || text.replace(/[\uD800-\uDBFF]$/, "");
}

const withoutReturns = (text) => (text.includes("\r") ? text.replace(/\r\n?/g, "\n") : text);
