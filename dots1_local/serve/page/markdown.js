// Markdown to elements that do nothing: no script, no style, no image, no address but web and mail.
//
// What the model writes as HTML is shown as text, but for a few harmless tags. DOMPurify checks the
// result once more; the page's Content-Security-Policy would stop what is left.

import { el } from "./dom.js";
import { t } from "./i18n.js";
import { Marked } from "./vendor/marked.js";
import "./vendor/purify.js";

const purify = globalThis.DOMPurify;
const HARMLESS = /^<\/?(?:b|br|i|kbd|mark|s|sub|sup|u)\s*\/?>$/i;
const ADDRESS = /^(?:https?:|mailto:)/i;
const ALLOWED = {
  ALLOWED_TAGS: [
    "a", "b", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "i", "input",
    "kbd", "li", "mark", "ol", "p", "pre", "s", "span", "strong", "sub", "sup", "table", "tbody", "td", "th", "thead",
    "tr", "u", "ul",
  ],
  ALLOWED_ATTR: ["align", "checked", "class", "disabled", "href", "start", "type"],
  ALLOWED_URI_REGEXP: ADDRESS,
  ADD_URI_SAFE_ATTR: ["align", "checked", "disabled", "start", "type"], // which hold no addresses
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

const escaped = (text) =>
  text.replace(/[&<>"']/g, (mark) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" })[mark]);

const marked = new Marked({ gfm: true, breaks: false, silent: true });
marked.use({
  renderer: {
    html: ({ text, block }) => {
      if (HARMLESS.test(text.trim())) return text;
      return block ? `<pre class="markup">${escaped(text.trim())}</pre>` : escaped(text);
    },
    image: ({ href, text }) => linked(href, escaped(t("image", { alt: text || href }))),
    link({ href, tokens }) {
      return linked(href, this.parser.parseInline(tokens));
    },
  },
});
marked.use({
  extensions: [
    formula("inline", /\\\(|\$\$/, /^(?:\\\((.{1,2000}?)\\\)|\$\$(.{1,2000}?)\$\$)/),
    formula("block", /^(?:\\\[|\$\$)/m, /^(?:\\\[([^]{1,2000}?)\\\]|\$\$([^]{1,2000}?)\$\$)[ \t]*(?:\n|$)/),
  ],
});

/** Show LaTeX as it was written, where Markdown would take its backslashes and underscores away. */
function formula(level, begin, pattern) {
  const name = `${level}Formula`;
  return {
    name,
    level,
    start: (source) => begin.exec(source)?.index,
    tokenizer(source) {
      const match = pattern.exec(source);
      return match ? { type: name, raw: match[0], text: (match[1] ?? match[2]).trim() } : undefined;
    },
    renderer: ({ text }) => (level === "block" ? `<pre class="formula">${escaped(text)}</pre>` : `<code class="formula">${escaped(text)}</code>`),
  };
}

const linked = (href, html) => (ADDRESS.test(href) ? `<a href="${escaped(href)}">${html}</a>` : html);

purify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName === "A") {
    node.setAttribute("target", "_blank");
    node.setAttribute("rel", "noopener noreferrer");
  }
  if (node.tagName === "INPUT") {
    node.setAttribute("type", "checkbox");
    node.setAttribute("disabled", "");
  }
});

/** Return the blocks of a Markdown text, each with its `raw` text; too deep a nesting is one plain block. */
export function blocksOf(text) {
  try {
    return marked.lexer(text);
  } catch {
    return [{ type: "paragraph", raw: text, tokens: [{ type: "text", raw: text, text }] }];
  }
}

/** Return blocks as a document fragment. */
export function renderBlocks(blocks) {
  const fragment = clean(htmlOf(blocks));
  for (const table of fragment.querySelectorAll("table")) {
    const frame = el("div", { className: "table", tabIndex: 0 });
    table.replaceWith(frame);
    frame.append(table);
  }
  return fragment;
}

function htmlOf(blocks) {
  try {
    return marked.parser(blocks);
  } catch {
    return `<p>${escaped(blocks.map(({ raw }) => raw).join(""))}</p>`;
  }
}

/** Return HTML as a document fragment, without all that could do something. */
export const clean = (html) => purify.sanitize(html, ALLOWED);
