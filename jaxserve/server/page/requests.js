// The last requests, newest first: who asked, what became of it, and a bar of where its time went.

import { count, duration, line } from "./figure.js";
import { make } from "./make.js";

const list = document.getElementById("requests");
const none = document.getElementById("no-requests");
const rows = new Map(); // request id -> its row, so that a reading changes rows and does not replace them

/** Show the requests of a reading of /stats; times are seconds of the server's clock. */
export function show(requests, nowS) {
  none.hidden = requests.length > 0;
  const spans = requests.map((request) => phases(request, nowS));
  const longest = Math.max(0.001, ...spans.map((span) => span.queued + span.prefill + span.decode));
  const seen = new Set();
  requests.forEach((request, place) => {
    seen.add(request.id);
    if (!rows.has(request.id)) rows.set(request.id, new Row());
    const row = rows.get(request.id);
    row.show(request, spans[place], longest);
    if (list.children[place] !== row.element) list.insertBefore(row.element, list.children[place] ?? null);
  });
  for (const [id, row] of rows) {
    if (seen.has(id)) continue;
    row.element.remove();
    rows.delete(id);
  }
}

/** Seconds spent queued, reading the prompt and writing the answer; until now while it is under way. */
function phases(request, nowS) {
  const end = request.finished_s ?? nowS;
  const first = request.first_token_s ?? end;
  const started = request.started_s ?? first;
  const at = (seconds) => Math.max(0, seconds);
  return { queued: at(started - request.arrival_s), prefill: at(first - started), decode: at(end - first) };
}

class Row {
  constructor() {
    this.element = make("li");
    this.what = make("span", "what");
    this.finish = make("span", "finish");
    this.bar = make("div", "timeline");
    this.bar.setAttribute("aria-hidden", "true"); // the line below says the same in words
    this.parts = ["queued", "prefill", "decode"].map((name) => make("i", name));
    this.bar.append(...this.parts);
    this.words = make("p", "words");
    const head = make("p", "head");
    head.append(this.what, this.finish);
    this.element.append(head, this.bar, this.words);
  }

  show(request, span, longest) {
    const who = [request.kind, request.client].filter(Boolean).join(" · ");
    const state = request.finish_reason ?? (request.first_token_s === null ? "waiting" : "running");
    write(this.what, who);
    this.what.title = `${request.model} · ${request.id}`;
    write(this.finish, state);
    this.finish.dataset.state = state;
    this.element.dataset.id = request.id;
    [span.queued, span.prefill, span.decode].forEach((seconds, i) => {
      this.parts[i].style.width = `${((seconds / longest) * 100).toFixed(2)}%`;
    });
    write(this.words, words(request, span));
  }
}

function words(request, span) {
  const cached = request.cached_tokens ? ` (${request.cached_tokens} cached)` : "";
  const said = [`${request.prompt_tokens}${cached} → ${count(request.output_tokens, "token")}`];
  said.push(duration(span.queued + span.prefill + span.decode));
  if (request.first_token_s !== null) said.push(`first ${duration(span.queued + span.prefill)}`);
  if (request.preemptions) said.push(`preempted ${request.preemptions}×`);
  return line(said);
}

function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
