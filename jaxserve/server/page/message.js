// One message on the screen. A model's text only ever becomes text nodes: nothing in it can become an element.

import { line } from "./figure.js";
import { button, make } from "./make.js";
import { Text } from "./text.js";

/** What the user has sent. */
export function question(text) {
  const article = make("article", "question");
  article.append(make("h3", "unseen", "You"), make("p", "text", text));
  return article;
}

/** An answer that grows. */
export class Answer {
  constructor(model) {
    this.element = make("article", "answer");
    this.element.setAttribute("aria-busy", "true"); // read out when it is whole, not word by word
    this.body = new Text();
    this.thoughts = null;
    this.foot = make("footer");
    this.element.append(make("h3", "unseen", `Answer of ${model}`), this.body.element, this.foot);
  }

  get text() {
    return this.body.raw;
  }

  push(text) {
    this.body.push(text);
  }

  /** What a model thinks before it answers stands above it, folded. */
  think(text) {
    if (!this.thoughts) {
      this.thoughts = make("p", "text");
      const fold = make("details", "thoughts");
      fold.append(make("summary", "", "Thoughts"), this.thoughts);
      this.body.element.before(fold);
    }
    this.thoughts.append(text); // a string becomes a text node
  }

  /** Say how it went, and offer the text for copying. */
  end(facts) {
    this.element.setAttribute("aria-busy", "false");
    this.body.end();
    if (facts.length) this.foot.append(make("span", "facts", line(facts)));
    if (this.text) this.foot.append(copier(this.text));
  }

  /** Say why it did not come to its end. */
  fail(sentence, retry) {
    const box = make("div", "error");
    box.setAttribute("role", "alert");
    box.append(make("p", "", sentence), button("quiet", "Try again", retry));
    this.foot.before(box);
  }
}

function copier(text) {
  const copy = button("quiet small", "Copy", async () => {
    try {
      await navigator.clipboard.writeText(text);
      copy.textContent = "Copied";
    } catch {
      copy.textContent = "Not allowed"; // the clipboard needs https or localhost
    }
    setTimeout(() => (copy.textContent = "Copy"), 1500);
  });
  return copy;
}
