// Requests to the server that this page comes from.

import { keep, kept } from "../kept.js";
import { events } from "./events.js";

/** An answer with an error status. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function apiKey() {
  return kept("key", "");
}

export function setApiKey(key) {
  keep("key", key);
}

/** A response that is well, with the API key sent along. Throws Refused, or TypeError offline. */
export async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (apiKey()) headers.Authorization = `Bearer ${apiKey()}`;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  throw new Refused(response.status, await reason(response));
}

async function reason(response) {
  const said = await response.json().catch(() => null);
  const message = said?.error?.message ?? said?.detail;
  if (typeof message === "string") return message;
  return `the server answered with status ${response.status}`;
}

/** The model's name. */
export async function modelName() {
  const { data } = await (await ask("/v1/models")).json();
  return data[0].id;
}

/**
 * Stream one answer.
 *
 * `heard({text, thinking})` is called with each piece. Gives {finish, usage}; throws Refused, also
 * where the answer fails on its way, and AbortError where `signal` stops it.
 */
export async function answer(body, signal, heard) {
  const response = await ask("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const end = { finish: null, usage: null };
  for await (const { data } of events(response)) {
    if (data === "[DONE]") return end;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refused(chunk.error.code ?? 500, chunk.error.message);
    if (chunk.usage) end.usage = chunk.usage;
    const choice = chunk.choices?.[0];
    if (!choice) continue;
    if (choice.finish_reason) end.finish = choice.finish_reason;
    const { content, reasoning_content: thinking } = choice.delta ?? {};
    if (content || thinking) heard({ text: content ?? "", thinking: thinking ?? "" });
  }
  throw new Refused(500, "the connection ended before the answer did");
}
