// The conversations: the one that is open, and what can be done with it. Views listen for changes.

import * as tree from "./conversation.js";
import { Generation } from "./generation.js";
import { t } from "./i18n.js";
import { notify } from "./notice.js";
import { defaultSettings, samplingOf } from "./sampling.js";
import { allConversations, deleteConversation, onOtherTab, readConversation, saveConversation } from "./store.js";

/**
 * Events: "list" when the list of conversations changes, "open" when another conversation or branch
 * is shown, "message" (detail: a message) when a message changes.
 */
class Chat extends EventTarget {
  list = [];
  current = tree.newConversation(defaultSettings());
  #running = new Map(); // generations by message id

  async load() {
    this.list = await allConversations();
    for (const conversation of this.list) settle(conversation);
    onOtherTab((id) => this.#reload(id));
    this.#tell("list");
  }

  get messages() {
    return tree.branch(this.current);
  }

  /** The generation that writes a message, if one does. */
  generationOf(message) {
    return this.#running.get(message.id);
  }

  /** The generation that writes in the branch that is shown. */
  get generation() {
    return this.messages.map((message) => this.generationOf(message)).find(Boolean);
  }

  open(id) {
    const found = this.list.find((conversation) => conversation.id === id);
    if (found) this.#show(found);
  }

  /** Show an empty conversation, which is kept once it has a message. */
  begin() {
    this.#show(tree.newConversation(defaultSettings()));
  }

  /** Add a message of the user at the end of the branch, and have it answered. */
  send(text, files) {
    this.#ask(this.messages.at(-1)?.id ?? "", text, files);
  }

  /** Add another version of a message of the user, and have it answered. */
  edit(message, text) {
    this.#ask(message.parent, text, message.files);
  }

  /** Have a message answered once more, or the message before an answer. */
  answerAgain(message) {
    this.#answer(message.role === "user" ? message : this.current.messages[message.parent]);
  }

  /** Show another version of a message, and what follows it. */
  showVersion(message) {
    this.current.shown[message.parent] = message.id;
    this.#save(this.current);
    this.#tell("open");
  }

  stop() {
    this.generation?.stop();
  }

  rename(conversation, title) {
    conversation.title = title;
    this.#save(conversation);
    if (conversation === this.current) this.#tell("open");
  }

  setSettings(settings) {
    this.current.settings = settings;
    if (this.list.includes(this.current)) this.#save(this.current);
  }

  async remove(conversation) {
    for (const id of Object.keys(conversation.messages)) this.#running.get(id)?.stop();
    this.list = this.list.filter((each) => each !== conversation);
    await deleteConversation(conversation.id);
    if (conversation === this.current) this.begin();
    this.#tell("list");
  }

  async add(conversations) {
    for (const conversation of conversations) await saveConversation(conversation);
    this.list.push(...conversations);
    this.#sort();
  }

  #ask(parent, text, files) {
    const message = tree.addMessage(this.current, parent, "user", text, files);
    this.#answer(message);
  }

  async #answer(question) {
    const conversation = this.current;
    const asked = tree.apiMessages(conversation, tree.upTo(conversation, question.id));
    const message = tree.addMessage(conversation, question.id, "assistant", "");
    message.state = "writing";
    const generation = new Generation(message, () => this.#tell("message", message), () => this.#keep(conversation));
    this.#running.set(message.id, generation);
    if (!this.list.includes(conversation)) this.list.unshift(conversation);
    this.#sort();
    this.#tell("open");
    await this.#save(conversation);
    await generation.run({ messages: asked, ...samplingOf(conversation.settings) });
    this.#running.delete(message.id);
    this.#tell("message", message);
    this.#tell("list");
    await this.#keep(conversation);
  }

  async #save(conversation) {
    await this.#keep(conversation);
    this.#tell("list");
  }

  /** Write a conversation that is in the list; the chat goes on where the browser keeps nothing. */
  async #keep(conversation) {
    if (!this.list.includes(conversation)) return;
    try {
      await saveConversation(conversation);
    } catch (error) {
      notify(t("notKept", { why: error.message }));
    }
  }

  #show(conversation) {
    this.current = conversation;
    this.#tell("list");
    this.#tell("open");
  }

  /** Take over what another tab has changed, unless this one writes to the same conversation. */
  async #reload(id) {
    const known = this.list.find((each) => each.id === id);
    if (known && Object.keys(known.messages).some((each) => this.#running.has(each))) return;
    const read = await readConversation(id);
    this.list = this.list.filter((each) => each.id !== id);
    if (read) this.list.unshift(read);
    this.#sort();
    if (this.current.id === id) {
      this.current = read ?? tree.newConversation(defaultSettings());
      this.#tell("open");
    }
  }

  #sort() {
    this.list.sort((a, b) => b.updated - a.updated);
    this.#tell("list");
  }

  #tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}

/** Mark answers that a page which is closed now did not finish. */
function settle(conversation) {
  for (const message of Object.values(conversation.messages)) {
    if (message.state === "writing") message.state = "stopped";
  }
}

export const chat = new Chat();
