// Why one request took as long as it did: the server's words, beside a picture of its stays.

import { read } from "./api.js";
import { byId, el, legend, time, timeline } from "./draw.js";

const KINDS = { queue: "waiting", prefill: "reading the prompt", preempted: "preempted", decode: "writing" };

export async function showWhy(id) {
  const body = byId("why-body");
  byId("why-title").textContent = "Where the time went";
  body.replaceChildren(el("p", { class: "under" }, id));
  if (!byId("why").open) byId("why").showModal();
  try {
    body.append(...told(await read(`v1/requests/${encodeURIComponent(id)}/explain`)));
  } catch (error) {
    body.append(el("p", { class: "refused", role: "alert" }, error.message));
  }
}

function told(explanation) {
  const [choice] = explanation.choices; // the others of a call came with it, and waited for the same
  const sentences = explanation.words.map((sentence) => el("li", {}, sentence));
  const words = el("ol", { class: "words" }, ...sentences);
  if (!choice) return [words];
  const stays = choice.phases.flatMap((phase, at) => drawn(phase, at, choice.chunks));
  const spent = (kind) => stays.filter((stay) => stay.kind === kind).reduce((sum, stay) => sum + stay.ms, 0);
  const kinds = Object.keys(KINDS).filter((kind) => spent(kind) > 0);
  const keys = kinds.map((kind) => [kind, `${KINDS[kind]} ${time(spent(kind))}`]);
  return [legend(time(choice.total_ms), keys), timeline(stays, choice.total_ms), words];
}

/** The boxes of one stay: prefill is cut where chunks end, and who waits again was preempted. */
function drawn({ kind: stay, begin_ms, ms }, at, chunks) {
  const kind = stay === "queue" && at > 0 ? "preempted" : stay;
  const ends = chunks.map((chunk) => chunk.begin_ms + chunk.ms).filter((end) => end > begin_ms && end < begin_ms + ms - 0.01);
  const cuts = [begin_ms, ...(kind === "prefill" ? ends : []), begin_ms + ms];
  return cuts.slice(1).map((end, part) => {
    const box = { kind, begin_ms: cuts[part], ms: end - cuts[part] };
    return { ...box, label: `${KINDS[kind]}: ${time(box.ms)}` };
  });
}
