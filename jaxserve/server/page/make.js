// Elements with a class and a text.

export function make(tag, name = "", text = "") {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text) element.textContent = text;
  return element;
}

/** A button that is not for sending a form. */
export function button(name, text, onClick) {
  const element = make("button", name, text);
  element.type = "button";
  element.addEventListener("click", onClick);
  return element;
}
