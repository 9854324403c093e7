// The figures of now, and a line of the last minute.

import { figure } from "./figure.js";

const by = (id) => document.getElementById(id);
const LENGTH = 60; // points of the line, one for each reading
const rates = [];

/** Show a reading of /stats. */
export function show(stats) {
  rate("rate", stats.output_tokens_per_s);
  rate("prompt-rate", stats.prompt_tokens_per_s);
  by("running").textContent = stats.running;
  by("waiting").textContent = stats.waiting;
  share("kv", stats.kv_share);
  share("hits", stats.cached_share);
  if (stats.output_tokens_per_s !== null) draw(stats.output_tokens_per_s);
}

/** Nothing is known: the server is away, or wants a key. */
export function blank() {
  for (const id of ["rate", "prompt-rate", "running", "waiting"]) by(id).textContent = "–";
  share("kv", null);
  share("hits", null);
}

function rate(id, value) {
  by(id).textContent = value === null ? "–" : figure(value);
}

function share(id, value) {
  const percent = value === null ? 0 : value * 100;
  by(id).textContent = value === null ? "–" : `${percent > 0 && percent < 10 ? percent.toFixed(1) : percent.toFixed(0)} %`;
  by(`${id}-bar`).setAttribute("aria-valuenow", percent.toFixed(0));
  by(`${id}-bar`).firstElementChild.style.width = `${percent}%`;
}

/** A path over the box of 60 x 40, newest on the right; the highest point of the time shown touches the top. */
function draw(rate) {
  rates.push(rate);
  if (rates.length > LENGTH) rates.shift();
  const top = Math.max(1, ...rates);
  const points = rates.map((value, i) => `${LENGTH - rates.length + i + 1},${(38 - (value / top) * 36).toFixed(2)}`);
  const line = `M${points.join("L")}`;
  const [, area, stroke] = by("spark").children;
  stroke.setAttribute("d", line);
  area.setAttribute("d", `${line}L${LENGTH},40L${LENGTH - rates.length + 1},40Z`);
}
