// The conversation: keeps it for this tab, sends it, and shows the answer as it comes.

import { ask, events } from "./api.js";
import { byId, count, el, time } from "./draw.js";

const STORE = "headrace-chat";
const FIELDS = ["system", "temperature", "max-tokens"];

export function startChat({ model, refused, explain }) {
  const log = byId("log");
  const turns = restore();
  let stopping = null; // ends the answer that is being written
  let failed = []; // a prompt and what the server had to say about it; the next one replaces them

  for (const turn of turns) log.append(shown(turn, explain).article);
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  byId("stop").addEventListener("click", () => stopping?.abort());
  byId("fresh").addEventListener("click", () => {
    stopping?.abort();
    turns.length = failed.length = 0;
    log.querySelectorAll("article").forEach((article) => article.remove());
    changed();
  });
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  byId("prompt").addEventListener("input", grow);
  FIELDS.forEach((id) => byId(id).addEventListener("change", changed));
  changed();

  function changed() {
    const fields = Object.fromEntries(FIELDS.map((id) => [id, byId(id).value]));
    sessionStorage.setItem(STORE, JSON.stringify({ turns, fields }));
    byId("welcome").hidden = turns.length > 0;
    byId("fresh").hidden = turns.length === 0;
  }

  function add(turn) {
    turns.push(turn);
    const view = shown(turn, explain);
    log.append(view.article);
    log.scrollTop = log.scrollHeight;
    changed();
    return view;
  }

  async function send() {
    const prompt = byId("prompt");
    if (stopping || !prompt.value.trim()) return;
    failed.forEach((article) => article.remove());
    failed = [];
    const asked = prompt.value;
    const question = add({ role: "user", content: asked });
    prompt.value = "";
    grow();
    const body = { model: model(), messages: messages(), stream: true, stream_options: { include_usage: true }, ...sampling() };
    const turn = { role: "assistant", content: "", reasoning: "", model: body.model };
    busy(true);
    const view = add(turn);
    try {
      await answer(body, turn, view);
    } catch (error) {
      if (error.name === "AbortError") turn.note = "stopped";
      else turn.error = error.message;
      refused(error);
    }
    busy(false);
    if (turn.error && !turn.content && !turn.reasoning) {
      turns.splice(-2); // the conversation goes on as if nothing had been said
      failed = [question.article, view.article];
      prompt.value ||= asked;
      grow();
    }
    view.update();
    changed();
  }

  async function answer(body, turn, view) {
    const begin = performance.now();
    const since = () => performance.now() - begin;
    stopping = new AbortController();
    const response = await ask("v1/chat/completions", { body, signal: stopping.signal });
    for await (const event of events(response)) {
      turn.id ??= event.id;
      const delta = event.choices[0]?.delta ?? {};
      turn.reasoning += delta.reasoning_content ?? "";
      turn.content += delta.content ?? "";
      if (delta.content || delta.reasoning_content) turn.first_ms ??= since();
      if (event.choices[0]?.finish_reason === "length") turn.note = "cut off at the most tokens";
      if (event.usage) turn.tokens = event.usage.completion_tokens;
      turn.total_ms = since();
      view.soon();
    }
  }

  function messages() {
    const system = byId("system").value.trim();
    const said = turns.map(({ role, content }) => ({ role, content }));
    return system ? [{ role: "system", content: system }, ...said] : said;
  }

  function busy(now) {
    if (!now) stopping = null;
    log.setAttribute("aria-busy", String(now));
    byId("send").hidden = now;
    byId("stop").hidden = !now;
    if (now) byId("stop").focus();
    else byId("prompt").focus();
  }
}

function sampling() {
  const [temperature, most] = [byId("temperature"), byId("max-tokens")].map((field) => field.valueAsNumber);
  return {
    ...(Number.isNaN(temperature) ? {} : { temperature }),
    ...(Number.isNaN(most) ? {} : { max_tokens: most }),
  };
}

function grow() {
  const prompt = byId("prompt");
  prompt.style.height = "auto";
  prompt.style.height = `${Math.min(prompt.scrollHeight + 2, 220)}px`;
}

function restore() {
  try {
    const { turns, fields } = JSON.parse(sessionStorage.getItem(STORE));
    FIELDS.forEach((id) => (byId(id).value = fields[id] ?? ""));
    const last = turns.at(-1);
    if (last?.role === "assistant" && last.total_ms == null) turns.splice(-2); // left while it waited
    return turns;
  } catch {
    return [];
  }
}

/** One turn on the page. `update` shows what it says now; `soon` does so before the next frame. */
function shown(turn, explain) {
  const text = el("div", { class: "text" });
  const thought = el("div", { class: "text" });
  const reasoning = el("details", { class: "thought", hidden: true }, el("summary", {}, "Reasoning"), thought);
  const foot = el("footer", {});
  const who = turn.role === "user" ? "You" : turn.model;
  const article = el("article", { class: turn.role, "aria-label": who }, el("header", {}, who), reasoning, text, foot);
  let due = false;

  function update() {
    due = false;
    const log = article.parentElement;
    const follows = log && log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    reasoning.hidden = !turn.reasoning;
    thought.textContent = turn.reasoning ?? "";
    text.replaceChildren(...prose(turn.content));
    foot.replaceChildren(...footer(turn, explain));
    if (follows) log.scrollTop = log.scrollHeight;
  }

  const soon = () => {
    if (!due) requestAnimationFrame(update);
    due = true;
  };
  update();
  return { article, update, soon };
}

/** Text as text, and fenced blocks in a face of their own. */
function prose(text) {
  return text
    .split(/^```.*$/m)
    .map((part, at) => (at % 2 ? el("pre", { tabindex: 0 }, part.trim()) : part.trim() && el("p", {}, part.trim())))
    .filter(Boolean);
}

function footer(turn, explain) {
  if (turn.role === "user") return [];
  const told = [
    turn.tokens && `${count(turn.tokens)} tokens`,
    turn.first_ms && `first after ${time(turn.first_ms)}`,
    turn.tokens > 1 && `${((1000 * (turn.tokens - 1)) / (turn.total_ms - turn.first_ms)).toFixed(1)} tokens/s`,
    turn.note,
    turn.total_ms == null && !turn.note && !turn.error && "waits for its first token",
  ];
  const why = turn.id && turn.total_ms && el("button", { type: "button", class: "link", onclick: () => explain(turn.id) }, "Where did the time go?");
  const error = turn.error && el("p", { class: "refused", role: "alert" }, turn.error);
  return [error, told.filter(Boolean).join(" · "), why].filter(Boolean);
}
