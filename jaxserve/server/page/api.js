// Calls of the server: the key goes along, and what goes wrong becomes one sentence.

import { events } from "./stream.js";

const KEY = "jaxserve-key"; // in sessionStorage: it ends with the tab

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** What the server, or the way to it, has against a request. `status` is 0 when no answer came. */
export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** GET or, with a body, POST. Paths are relative, so that the page also works below a proxy's prefix. */
async function call(path, body, signal) {
  const headers = {};
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.");
  }
  if (!response.ok) throw new ApiError(await sentence(response), response.status);
  return response;
}

/** The server's own words, whichever of the usual shapes they come in. */
async function sentence(response) {
  const text = await response.text().catch(() => "");
  try {
    const body = JSON.parse(text);
    const said = body.error?.message ?? body.message ?? body.detail;
    if (typeof said === "string" && said) return said;
  } catch {
    // not JSON: a proxy's page, which nobody wants to read here
  }
  return `The server answered ${response.status} ${response.statusText}`.trim() + ".";
}

export const get = async (path, signal) => (await call(path, undefined, signal)).json();

/** POST and yield the objects of the event stream until [DONE]. An object with an error is thrown. */
export async function* stream(path, body, signal) {
  const response = await call(path, body, signal);
  let isDone = false;
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") {
        isDone = true;
        break;
      }
      const piece = JSON.parse(data);
      if (piece.error) throw new ApiError(piece.error.message ?? "The answer failed.", response.status);
      yield piece;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError("The connection ended in the middle of the answer.");
  }
  if (!isDone) throw new ApiError("The connection ended in the middle of the answer.");
}
