// Talks to the server: the one place that knows the key, and how errors and streams look on the wire.

const KEY = "headrace-key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** What the server refuses, in its own words. Status 0: it did not answer at all. */
export class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** A response that is fine. Throws Refusal, or AbortError where `signal` ended it. */
export async function ask(path, { body, signal } = {}) {
  const headers = { Accept: "application/json" };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    const method = body ? "POST" : "GET";
    response = await fetch(path, { method, headers, signal, cache: "no-store", body: body && JSON.stringify(body) });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Refusal(0, "The server does not answer.");
  }
  if (!response.ok) throw new Refusal(response.status, await sentence(response));
  return response;
}

export const read = async (path) => (await ask(path)).json();

async function sentence(response) {
  const error = await response.json().then((body) => body.error, () => null);
  return error?.message ?? `The server answered with status ${response.status}.`;
}

/** The events of a stream as objects. Throws Refusal where the server ends it with an error. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    const blocks = (held + (value ?? "")).split("\n\n");
    held = done ? "" : blocks.pop();
    for (const block of blocks) {
      const data = block.replace(/^data: /, "");
      if (data === "[DONE]") return;
      if (!data || data.startsWith(":")) continue;
      const event = JSON.parse(data);
      if (event.error) throw new Refusal(response.status, event.error.message);
      yield event;
    }
    if (done) throw new Refusal(0, "The connection broke off before the end of the answer.");
  }
}
