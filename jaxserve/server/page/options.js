// The form of sampling options, and what it says in OpenAI's words.

const form = document.getElementById("settings");
const field = (id) => form.elements.namedItem(id);

/** Show what sliders are set to. */
export function watch() {
  for (const name of ["temperature", "top_p"]) {
    const show = () => (form.elements.namedItem(`${name}-value`).value = Number(field(name).value).toFixed(2));
    field(name).addEventListener("input", show);
    show();
  }
  form.addEventListener("submit", (event) => event.preventDefault());
}

export const system = () => field("system").value.trim();

/** The fields of a request's body. What is left empty is left out, so that the server's own default holds. */
export function sampling() {
  const body = { temperature: Number(field("temperature").value), top_p: Number(field("top_p").value) };
  for (const name of ["max_tokens", "seed"]) {
    if (field(name).value !== "") body[name] = Number(field(name).value);
  }
  const stop = field("stop").value.split("\n").filter(Boolean);
  if (stop.length) body.stop = stop;
  return body;
}

/** The first field with a value that cannot be, or none. */
export const invalid = () => [...form.elements].find((element) => element.willValidate && !element.validity.valid);
