// Puts the page together: models, views of a narrow window, and a reading of /stats every second.

import { get, key } from "./api.js";
import * as chat from "./chat.js";
import * as gauges from "./gauges.js";
import * as options from "./options.js";
import * as requests from "./requests.js";

const EVERY_MS = 1000;
const health = document.getElementById("health");
const model = document.getElementById("model");
const keyField = document.getElementById("key");
let timer = 0;
let turn = 0; // of readings: only the newest may show what it found, and go on

function say(state, text) {
  health.dataset.state = state;
  if (health.textContent !== text) health.textContent = text;
}

/** Ask for the models once; again after a new key, or when the server comes back. */
async function loadModels() {
  const names = (await get("v1/models")).data.map((entry) => entry.id);
  const before = model.value;
  model.replaceChildren(...names.map((name) => new Option(name, name)));
  if (names.includes(before)) model.value = before;
  model.disabled = false;
  chat.ready(names.length > 0);
  model.dispatchEvent(new Event("change"));
}

/** One reading, then the next in a second, as long as somebody looks. */
async function read() {
  clearTimeout(timer);
  const mine = ++turn;
  if (document.hidden) return;
  try {
    if (model.disabled) await loadModels();
    const stats = await get("stats");
    if (mine !== turn) return;
    gauges.show(stats);
    requests.show(stats.requests, stats.now_s);
    say("good", stats.running || stats.waiting ? "busy" : "idle");
  } catch (error) {
    if (mine !== turn) return;
    gauges.blank();
    if (error.status === 401) {
      model.disabled = true;
      chat.ready(false);
      say("bad", key.get() ? "unknown API key, see Options" : "enter an API key, see Options");
      return; // until the key changes
    }
    say("bad", error.message);
  }
  timer = setTimeout(read, EVERY_MS);
}

function show(view) {
  document.body.dataset.view = view;
  for (const button of document.querySelectorAll("[data-show]")) {
    button.setAttribute("aria-pressed", String(button.dataset.show === view));
  }
}

for (const button of document.querySelectorAll("[data-show]")) {
  button.addEventListener("click", () => show(button.dataset.show));
}
keyField.value = key.get();
keyField.addEventListener("change", () => {
  key.set(keyField.value.trim());
  model.disabled = true;
  read();
});
document.addEventListener("visibilitychange", read);
options.watch();
chat.start();
read();
