// What the server does at the moment, from /slots and /metrics.

import { metrics, slots } from "./server.js";

/** Return the figures of the text that Prometheus reads, those without labels by their names. */
export function readMetrics(text) {
  const lines = [...text.matchAll(/^dots1_(\w+) (\S+)$/gm)];
  return Object.fromEntries(lines.map(([, name, value]) => [name, Number(value)]));
}

/** Samples the server; speeds are the differences between two samples of the slots. */
export class LiveFigures {
  #before;
  #speeds = {};

  /** Return the slots, counts of the queue and of tokens, and tokens a second, the latest that are known. */
  async sample() {
    const [now, text] = await Promise.all([slots(), metrics()]);
    const at = performance.now();
    if (this.#before) this.#measure(this.#before, { slots: now, at });
    this.#before = { slots: now, at };
    const counts = readMetrics(text);
    return {
      slots: now,
      running: counts.running ?? 0,
      waiting: counts.waiting ?? 0,
      prompt: counts.prompt_tokens_total ?? 0,
      cached: counts.cached_tokens_total ?? 0,
      ram: counts.cache_ram_bytes ?? 0,
      disk: counts.cache_disk_bytes ?? 0,
      ...this.#speeds,
    };
  }

  #measure(before, now) {
    const elapsed = (now.at - before.at) / 1000;
    let decoded = 0;
    let read = 0;
    for (const slot of now.slots) {
      const last = before.slots.find((each) => each.id === slot.id);
      if (!slot.busy || !last?.busy || last.prompt_tokens !== slot.prompt_tokens) continue;
      decoded += Math.max(0, slot.generated_tokens - last.generated_tokens);
      if (!last.generated_tokens) read += Math.max(0, Math.min(slot.cached_tokens, slot.prompt_tokens) - last.cached_tokens);
    }
    if (decoded) this.#speeds.decode = decoded / elapsed;
    if (read) this.#speeds.prefill = read / elapsed;
    this.#speeds.active = decoded + read > 0;
  }
}
