// Puts the page together: which view shows, which model answers, who asks for a key. Chat and live view do the rest.

import { key, read } from "./api.js";
import { startChat } from "./chat.js";
import { byId, el } from "./draw.js";
import { showWhy } from "./explain.js";
import { startLive } from "./live.js";

const MODELS_EVERY_MS = 5000;
const SHOWN = { cold: "not loaded", loading: "loading…", unloading: "unloading…" };

/** Handles what any part of the page is refused: asks for a key where one is missing. True if that was it. */
function refused(error) {
  if (error.status !== 401) return false;
  byId("open-key").hidden = false;
  if (!byId("door").open && !refused.declined) {
    byId("door-says").textContent = error.message;
    byId("door").showModal();
  }
  return true;
}

function keyDialog() {
  const door = byId("door");
  byId("open-key").addEventListener("click", () => door.showModal());
  byId("no-key").addEventListener("click", () => door.close());
  byId("use-key").addEventListener("click", () => {
    key.set(byId("key").value.trim());
    byId("key").value = "";
  });
  door.addEventListener("close", () => {
    refused.declined = door.returnValue !== "use";
    if (!refused.declined) listModels();
  });
}

/** The picker, without disturbing a choice that was made. */
async function listModels() {
  const picker = byId("model");
  try {
    const { data } = await read("v1/models");
    const writers = data.filter((model) => model.writes !== false);
    const chosen = picker.value;
    const options = writers.map(({ id, state }) => {
      const note = SHOWN[state] ? ` (${SHOWN[state]})` : "";
      return el("option", { value: id, selected: id === chosen }, id + note);
    });
    picker.replaceChildren(...options);
    picker.hidden = !options.length;
    byId("state").textContent = "";
    byId("state").className = "state";
  } catch (error) {
    if (!refused(error)) byId("state").textContent = error.message;
    byId("state").className = "state bad";
  }
}

function views() {
  const buttons = [...document.querySelectorAll("[data-show]")];
  for (const button of buttons) {
    button.addEventListener("click", () => {
      document.body.dataset.view = button.dataset.show;
      for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
    });
  }
}

/** Run `work` now and then, one after the other, while somebody looks. */
function whileVisible(work, every_ms) {
  const turn = async () => {
    if (!document.hidden && !byId("door").open) await work();
    setTimeout(turn, every_ms);
  };
  document.addEventListener("visibilitychange", () => document.hidden || work());
  turn();
}

views();
keyDialog();
whileVisible(listModels, MODELS_EVERY_MS);
startChat({ model: () => byId("model").value, refused, explain: showWhy });
whileVisible(startLive({ refused, explain: showWhy }), 1000);
