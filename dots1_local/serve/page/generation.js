// One answer being written: it takes what the server streams, and measures how fast it comes.

import { streamChat } from "./server.js";

const SAVE_EVERY = 1500; // milliseconds

export class Generation {
  #stop = new AbortController();
  #asked = performance.now();
  #first;
  #last;
  #chunks = 0;

  /** Write into `message`; `notify` is called after each change, and `save` now and then. */
  constructor(message, notify, save) {
    this.message = message;
    this.notify = notify;
    this.save = save;
    this.progress = undefined; // of reading the prompt: tokens done, and all
  }

  stop() {
    this.#stop.abort();
  }

  /** Tokens a second so far; a chunk is about a token. */
  get speed() {
    return this.#chunks > 8 ? ((this.#chunks - 1) * 1000) / (this.#last - this.#first) : undefined;
  }

  /** Write the whole answer; what goes wrong is kept in the message. */
  async run(body) {
    const { message } = this;
    let saved = performance.now();
    try {
      for await (const chunk of streamChat(body, this.#stop.signal)) {
        this.#take(chunk);
        this.notify();
        if (performance.now() - saved > SAVE_EVERY) {
          saved = performance.now();
          await this.save();
        }
      }
      message.state = "done";
    } catch (error) {
      message.state = this.#stop.signal.aborted ? "stopped" : "failed";
      if (message.state === "failed") message.error = error.message;
    }
    message.stats ??= this.#measured({});
  }

  #take({ choices, usage, prompt_progress: progress, timings }) {
    if (progress) this.progress = { done: progress.processed, all: progress.total };
    const [choice] = choices ?? [];
    const text = choice?.delta?.content;
    if (text) {
      this.#last = performance.now();
      this.#first ??= this.#last;
      this.#chunks += 1;
      this.message.text += text;
      this.progress = undefined;
    }
    if (choice?.finish_reason === "length") this.message.cutOff = true;
    if (usage) this.message.stats = this.#measured(usage, timings);
  }

  /** Return token counts, the seconds until the first token, and tokens a second. */
  #measured(usage, timings) {
    if (!this.#first) return undefined;
    const first = (this.#first - this.#asked) / 1000;
    const prompt = usage.prompt_tokens;
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    const completion = usage.completion_tokens ?? this.#chunks;
    const writing = (this.#last - this.#first) / 1000;
    return {
      prompt, cached, completion, first,
      prefill: timings?.prompt_per_second ?? (prompt ? (prompt - cached) / first : undefined),
      decode: timings?.predicted_per_second ?? (writing > 0 && completion > 1 ? (completion - 1) / writing : undefined),
    };
  }
}
