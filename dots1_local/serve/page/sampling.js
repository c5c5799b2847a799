// The settings of a conversation: its system prompt, and how tokens are sampled.

import { preferences, setPreference } from "./preferences.js";

/** The numbers that the server takes: name, label, range, step, and the server's default. */
export const NUMBERS = [
  { name: "temperature", label: "temperature", min: 0, max: 2, step: 0.05, usual: "0.7" },
  { name: "top_p", label: "topP", min: 0, max: 1, step: 0.01, usual: "0.95" },
  { name: "top_k", label: "topK", min: 0, max: 1000, step: 1, usual: "40" },
  { name: "min_p", label: "minP", min: 0, max: 1, step: 0.01, usual: "0.05" },
  { name: "repetition_penalty", label: "repeatPenalty", min: 0.1, max: 10, step: 0.05, usual: "1" },
  { name: "max_tokens", label: "maxTokens", min: 1, max: 1_000_000, step: 1, usual: "" },
  { name: "seed", label: "seed", min: 0, max: 4_294_967_295, step: 1, usual: "" },
];

/** Return the settings that are known and in their ranges. */
export function cleanSettings(raw) {
  const settings = {};
  if (typeof raw.system === "string") settings.system = raw.system;
  for (const { name, min, max } of NUMBERS) {
    if (Number.isFinite(raw[name]) && raw[name] >= min && raw[name] <= max) settings[name] = raw[name];
  }
  return settings;
}

/** Return what a request says of sampling. */
export function samplingOf(settings) {
  const { system: _, ...numbers } = cleanSettings(settings);
  return numbers;
}

export const defaultSettings = () => cleanSettings(preferences().settings ?? {});
export const setDefaultSettings = (settings) => setPreference("settings", cleanSettings(settings));
