// What the server does now: figures, memory, its last steps, its requests. Reads when told to, while it can be seen.

import { key, read } from "./api.js";
import { bar, byId, count, el, keyed, stepBars, time } from "./draw.js";

const STEPS = 200;
const RATE_OVER_S = 5;
const TOLD_MS = 100; // shorter waits need no reason in the table
const STATES = {
  waiting: ["queue", "waits"],
  prefilling: ["prefill", "reads its prompt"],
  decoding: ["decode", "writes"],
};
const HELD = { places: "a place", memory: "memory", policy: "the admission policy" };

/** Returns what reads and shows everything once. */
export function startLive({ refused, explain }) {
  const chart = byId("steps");
  let steps = [];
  let closed = null; // the key to which the server does not show what it does as a whole, only its tenant's requests
  let marked = null; // the step that is pointed at, counted back from the newest place

  chart.addEventListener("pointermove", ({ clientX }) => {
    const box = chart.getBoundingClientRect();
    mark(Math.floor(((box.right - clientX) / box.width) * STEPS));
  });
  chart.addEventListener("pointerleave", () => mark(null));
  chart.addEventListener("blur", () => mark(null));
  chart.addEventListener("keydown", ({ key }) => {
    const move = { ArrowLeft: 1, ArrowRight: -1 }[key];
    if (move) mark(marked == null ? 0 : marked + move);
  });

  function mark(back) {
    marked = back == null ? null : Math.max(0, Math.min(back, steps.length - 1));
    show();
  }

  function show() {
    const at = marked == null ? null : steps.length - 1 - marked;
    chart.replaceChildren(...stepBars(steps, STEPS, at));
    byId("step").textContent = toldStep(steps[at]);
  }

  /** The steps, or nothing where this key may not see them. */
  async function beats() {
    if (closed === key.get()) return null;
    const asked = key.get();
    try {
      return await read("v1/steps");
    } catch (error) {
      if (error.status !== 403) throw error;
      closed = asked;
      return null;
    }
  }

  function whole({ data, now, memory }) {
    const all = data.map(drawable);
    steps = all.slice(-STEPS);
    rates(all, now);
    bars(memory);
    show();
  }

  return async () => {
    if (!byId("live").offsetParent) return;
    try {
      const [beat, { data: requests }] = await Promise.all([beats(), read("v1/requests?limit=50")]);
      document.querySelectorAll("#live .whole").forEach((part) => (part.hidden = !beat));
      if (beat) whole(beat);
      figures(requests);
      table(requests, explain);
      byId("requests-note").textContent = note(requests, beat);
      byId("away").hidden = true;
    } catch (error) {
      byId("away").hidden = refused(error);
      byId("away").textContent = error.message;
    }
  };
}

/** A step as the picture needs it. Equal steps that the engine repeated are one, as high as each of them took. */
function drawable(step) {
  const answers = Math.min(step.tokens, step.requests - step.prompts); // who decodes computes one token
  return { ...step, answers, each_ms: step.ms / step.repetitions, decodeShare: answers / Math.max(1, step.tokens) };
}

function toldStep(step) {
  if (!step) return "Point at a step; or focus the picture and use the arrow keys.";
  const which = step.repetitions > 1 ? `${count(step.repetitions)} steps of ${time(step.each_ms)}` : `A step of ${time(step.ms)}`;
  const what = `${count(step.tokens - step.answers)} tokens of prompts, ${count(step.answers)} of answers, ${count(step.requests)} requests`;
  const held = HELD[step.held] ? `; the next one waits for ${HELD[step.held]}` : "";
  return `${which}: ${what}; ${count(step.waiting)} waiting, ${count(step.used_blocks)} blocks in use${held}.`;
}

/** Tokens a second over the last seconds, of what `tokens` finds in a step. */
function rate(steps, now, tokens) {
  const since = now - RATE_OVER_S;
  const recent = steps.filter((step) => step.ended > since);
  const inside = (step) => Math.min(1, (1000 * (step.ended - since)) / (step.ms || 1)); // a long run may have begun before
  return recent.reduce((sum, step) => sum + tokens(step) * step.repetitions * inside(step), 0) / RATE_OVER_S;
}

function rates(steps, now) {
  byId("output-rate").textContent = count(rate(steps, now, (step) => step.answers));
  byId("prompt-rate").textContent = count(rate(steps, now, (step) => step.tokens - step.answers));
}

function figures(requests) {
  const inState = (...states) => requests.filter(({ state }) => states.includes(state)).length;
  byId("running").textContent = count(inState("prefilling", "decoding"));
  byId("waiting").textContent = count(inState("waiting"));
}

/** A bar for each model that has blocks. */
function bars(models) {
  const drawn = models.map(({ model, total_blocks, used_blocks, cached_blocks, block_tokens }) => {
    const free_blocks = total_blocks - used_blocks - cached_blocks;
    const part = (kind, blocks, word) => [kind, blocks, `${count(blocks * block_tokens)} ${word}`];
    const parts = [part("decode", used_blocks, "in use"), part("cached", cached_blocks, "cached"), part("free", free_blocks, "free")];
    return bar(models.length > 1 ? `KV of ${model}` : "Tokens in KV memory", parts);
  });
  byId("memory").replaceChildren(...drawn.flat());
}

function table(requests, explain) {
  const focused = document.activeElement?.dataset?.request;
  const rows = requests.flatMap((one) => [row(one, explain), ...reason(one)]);
  byId("requests").tBodies[0].replaceChildren(...rows);
  if (focused) rows.map((line) => line.querySelector("button")).find((button) => button?.dataset.request === focused)?.focus();
}

function note(requests, whole) {
  const choose = requests.length ? "Choose one to see where its time goes." : "No request yet.";
  return whole ? choose : `${choose} These are your tenant’s; the whole server is shown to an admin’s key.`;
}

function row(one, explain) {
  const open = el("button", { type: "button", class: "link", "data-request": one.id, onclick: () => explain(one.id) }, short(one.id));
  const state = STATES[one.state] ?? ["free", one.finish ?? one.state];
  return el(
    "tr",
    { class: one.state === "finished" && "done" },
    el("th", { scope: "row", title: one.id }, open),
    el("td", {}, one.tenant || "–"),
    el("td", {}, keyed(...state)),
    ...[one.total_ms, one.queue_ms, one.ttft_ms].map((ms) => el("td", {}, time(ms))),
    el("td", {}, `${count(one.prompt_tokens)} + ${count(one.output_tokens)}`),
  );
}

/** A line of its own below the request, so that it takes no width from the figures. */
function reason({ waits_for, queue_ms, total_ms, state }) {
  if (!waits_for || (queue_ms || total_ms) < TOLD_MS) return [];
  const told = `${state === "waiting" ? "waits" : "waited"} for ${waits_for}`;
  return [el("tr", { class: "reason" }, el("td", { class: "under", colspan: 7 }, told))];
}

const short = (id) => (id.length > 14 ? `…${id.slice(-8)}` : id);
