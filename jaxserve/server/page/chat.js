// The conversation: send, stream, stop, try again.

import { ApiError, stream } from "./api.js";
import { count, duration, figure } from "./figure.js";
import { Answer, question } from "./message.js";
import * as options from "./options.js";

const log = document.getElementById("log");
const welcome = document.getElementById("welcome");
const prompt = document.getElementById("prompt");
const note = document.getElementById("note");
const send = document.getElementById("send");
const stop = document.getElementById("stop-answer");
const fresh = document.getElementById("fresh");
const model = document.getElementById("model");

const SPAN_MS = 50; // tokens that came within less have come in heaps, which says nothing of how fast they were made
const plain = new Set(); // models that turned out to have no chat template
let turns = []; // { question, answer }: of answers that came to something
let running = null; // AbortController of the answer under way
let follows = true; // whether the reader is at the end of the conversation
let place = 0; // where the reader was last
let frame = 0;

/** Wire the form. Messages can be sent once `ready` says so. */
export function start() {
  document.getElementById("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    ask();
  });
  prompt.addEventListener("input", fit);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") running?.abort();
  });
  stop.addEventListener("click", () => running?.abort());
  fresh.addEventListener("click", clear);
  model.addEventListener("change", explain);
  log.addEventListener("scroll", look);
  new ResizeObserver(scroll).observe(log);
}

export function ready(isReady) {
  send.disabled = !isReady;
}

function ask() {
  const text = prompt.value;
  if (running || send.disabled || !text.trim()) return;
  const wrong = options.invalid();
  if (wrong) {
    document.querySelector('[data-show="options"]').click(); // on a phone the field is on another view
    wrong.reportValidity();
    return;
  }
  prompt.value = "";
  fit();
  welcome.hidden = true;
  fresh.disabled = false;
  log.append(question(text));
  answer(text);
}

async function answer(text) {
  const shown = new Answer(model.value);
  log.append(shown.element);
  follows = true;
  scroll();
  setRunning(new AbortController());
  const mine = running;
  const timing = { sent: performance.now(), first: null, last: null, pieces: 0, usage: null, finish: null };
  try {
    for await (const piece of pieces(text, mine.signal)) take(piece, shown, timing);
    shown.end(facts(timing));
  } catch (error) {
    shown.end(facts(timing, error.name === "AbortError" ? "stopped" : "failed"));
    if (error.name !== "AbortError") {
      if (!(error instanceof ApiError)) console.error(error); // a mistake of this page
      shown.fail(error.message, () => {
        shown.element.remove();
        if (!running) answer(text);
      });
    }
  }
  if (running !== mine) return; // a new conversation has begun meanwhile
  if (shown.text) turns.push({ question: text, answer: shown.text });
  setRunning(null);
  scroll();
}

/** The pieces of an answer; models without a chat template continue the text as it stands. */
async function* pieces(text, signal) {
  const name = model.value;
  const common = { model: name, stream: true, stream_options: { include_usage: true }, ...options.sampling() };
  if (!plain.has(name)) {
    try {
      return yield* stream("v1/chat/completions", { ...common, messages: messages(text) }, signal);
    } catch (error) {
      if (!error.status || !/no chat template/i.test(error.message)) throw error;
      plain.add(name);
      explain();
    }
  }
  const before = turns.map((turn) => turn.question + turn.answer).join("");
  yield* stream("v1/completions", { ...common, prompt: before + text }, signal);
}

function messages(text) {
  const said = turns.flatMap((turn) => [
    { role: "user", content: turn.question },
    { role: "assistant", content: turn.answer },
  ]);
  const first = options.system() ? [{ role: "system", content: options.system() }] : [];
  return [...first, ...said, { role: "user", content: text }];
}

function take(piece, shown, timing) {
  const choice = piece.choices?.[0];
  const thought = choice?.delta?.reasoning_content ?? choice?.delta?.reasoning;
  const text = choice?.delta?.content ?? choice?.text;
  if (text || thought) {
    timing.last = performance.now();
    timing.first ??= timing.last;
    timing.pieces += 1;
    if (thought) shown.think(thought);
    if (text) shown.push(text);
    scroll();
  }
  if (choice?.finish_reason) timing.finish = choice.finish_reason;
  if (piece.usage) timing.usage = piece.usage;
}

/** How an answer went, in words. Without the server's count (it comes last) pieces stand for tokens. */
function facts({ sent, first, last, pieces, usage, finish }, ended = null) {
  const tokens = usage?.completion_tokens ?? pieces;
  if (!pieces && !usage) return ended === "stopped" ? [ended] : [];
  const list = [`${usage ? "" : "about "}${count(tokens, "token")}`];
  if (last - first > SPAN_MS) list.push(`${figure(((tokens - 1) / (last - first)) * 1000)} tokens/s`);
  if (first !== null) list.push(`first after ${duration((first - sent) / 1000)}`);
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  if (cached) list.push(`${cached} of ${usage.prompt_tokens} prompt tokens cached`);
  if (ended === "stopped") list.push(ended);
  else if (finish === "length") list.push("cut at max tokens");
  else if (finish && finish !== "stop") list.push(finish);
  return list;
}

function clear() {
  running?.abort();
  setRunning(null);
  turns = [];
  log.replaceChildren(welcome);
  welcome.hidden = false;
  fresh.disabled = true;
  prompt.focus();
}

function setRunning(controller) {
  running = controller;
  stop.hidden = !controller;
  send.hidden = Boolean(controller);
}

function explain() {
  note.hidden = !plain.has(model.value);
  note.textContent = "This model has no chat template, so it continues your text as it stands; a system prompt is not used.";
}

/** Who moves up wants to read there. To be far from the end is no sign of it: text may have come since we moved down. */
function look() {
  const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  if (isAtEnd || log.scrollTop < place) follows = isAtEnd;
  place = log.scrollTop;
}

/** Follow the answer, unless the reader has scrolled up; once a picture, however fast tokens come. */
function scroll() {
  if (!frame) frame = requestAnimationFrame(() => {
    frame = 0;
    if (follows) log.scrollTop = log.scrollHeight;
  });
}

/** The box grows with its text; CSS says how far. */
function fit() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}
