// One message as it is shown: its text, its versions, what can be done with it, how fast it came.

import { Answer } from "./answer.js";
import { chat } from "./chat.js";
import { versions } from "./conversation.js";
import { copyButton, el, icon, iconButton } from "./dom.js";
import { bytes, number, rate, seconds, t } from "./i18n.js";

export class MessageView {
  constructor(message) {
    this.message = message;
    this.body = el("div", { className: "body" });
    this.foot = el("div", { className: "foot" });
    this.element = el("article", { className: `message ${message.role}`, "aria-label": t(message.role === "user" ? "you" : "answer"), data: { id: message.id } }, this.body, this.foot);
    if (message.role === "user") this.#showQuestion();
    else this.#showAnswer();
  }

  /** Show what has changed in an answer. */
  update() {
    const { message } = this;
    const generation = chat.generationOf(message);
    if (generation) {
      this.element.classList.add("writing");
      if (message.text) this.answer.grow(message.text);
      this.#showProgress(generation);
    } else {
      this.answer.finish(message.text, () => {
        this.element.classList.remove("writing");
        this.#showFoot();
      });
    }
  }

  #showQuestion() {
    const { text, files } = this.message;
    this.body.replaceChildren(...(files ?? []).map(fileChip), el("div", { className: "said" }, text));
    this.foot.replaceChildren(...this.#pager(), iconButton("edit", t("edit"), () => this.edit()), copyButton(() => text, t("copy"), t("copied")));
  }

  #showAnswer() {
    this.answer = new Answer(el("div", { className: "answer" }));
    this.body.append(this.answer.root);
    this.update();
  }

  #showProgress({ progress, speed }) {
    let line = this.foot.querySelector(".progress");
    if (!line) {
      line = el("span", { className: "progress" });
      this.foot.replaceChildren(dots(), line);
    }
    line.textContent = progress && progress.done < progress.all
      ? t("reading", { done: number(progress.done), all: number(progress.all) })
      : speed ? rate(speed) : "";
  }

  #showFoot() {
    const { message } = this;
    const note = { stopped: t("stopped"), failed: `${t("failed")}: ${message.error}` }[message.state] ?? (message.cutOff ? t("cutOff") : "");
    const failed = message.state === "failed";
    const again = failed
      ? el("button", { type: "button", className: "retry", onclick: () => chat.answerAgain(message) }, icon("redo"), t("retry"))
      : iconButton("redo", t("regenerate"), () => chat.answerAgain(message));
    this.foot.replaceChildren(
      ...(note ? [el("span", { className: failed ? "note failed" : "note", role: failed ? "alert" : "note" }, note)] : []),
      ...this.#pager(),
      copyButton(() => message.text, t("copy"), t("copied")),
      again,
      ...(message.stats ? [statsLine(message.stats)] : []),
    );
  }

  /** Return the buttons that page through the versions of the message. */
  #pager() {
    const all = versions(chat.current, this.message);
    if (all.length < 2) return [];
    const at = all.indexOf(this.message);
    const to = (index) => () => chat.showVersion(all[index]);
    const place = t("version", { n: at + 1, all: all.length });
    return [el("span", { className: "pager", role: "group", "aria-label": place },
      iconButton("left", t("previous"), to(at - 1), { disabled: at === 0 }),
      el("span", { "aria-hidden": "true" }, `${at + 1}/${all.length}`),
      iconButton("right", t("next"), to(at + 1), { disabled: at === all.length - 1 }))];
  }

  /** Let the user change a question and send it again as a new version. */
  edit() {
    const area = el("textarea", { value: this.message.text, "aria-label": t("edit"), rows: Math.min(12, this.message.text.split("\n").length + 1) });
    const cancel = () => this.#showQuestion();
    const send = () => {
      if (area.value.trim()) chat.edit(this.message, area.value);
    };
    area.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Escape") cancel();
      if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        send();
      }
    });
    this.body.replaceChildren(area);
    this.foot.replaceChildren(
      el("button", { type: "button", onclick: cancel }, t("cancel")),
      el("button", { type: "button", className: "primary", onclick: send }, t("send")),
    );
    area.focus();
  }
}

/** Return a name and size of a file, whose text can be unfolded. */
function fileChip({ name, text }) {
  const size = bytes(new TextEncoder().encode(text).length);
  return el("details", { className: "file" }, el("summary", {}, icon("clip"), `${name} · ${size}`), el("pre", {}, text));
}

const dots = () => el("span", { className: "dots", role: "img", "aria-label": t("answering") }, el("i"), el("i"), el("i"));

function statsLine({ prompt, cached, completion, first, prefill, decode }) {
  const parts = [];
  if (completion) parts.push(t("tokens", { n: number(completion) }));
  if (decode) parts.push(rate(decode));
  if (first !== undefined) parts.push(t("firstToken", { s: seconds(first) }));
  if (prompt) {
    const read = t("promptStats", { n: number(prompt) });
    parts.push(cached ? `${read} (${t("tokensCached", { n: number(cached) })})` : read);
    if (prefill) parts.push(`${t("prefill")} ${rate(prefill)}`);
  }
  return el("span", { className: "stats" }, ...parts.map((part) => el("span", {}, part)));
}
