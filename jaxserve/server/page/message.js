// One message on the screen. A model's text only ever becomes text nodes: nothing in it can become an element.

/** An element with a class and a text. */
export function make(tag, name = "", text = "") {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text) element.textContent = text;
  return element;
}

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
    this.body = make("div", "text");
    this.tail = document.createTextNode("");
    this.body.append(this.tail);
    this.foot = make("footer");
    this.element.append(make("h3", "unseen", `Answer of ${model}`), this.body, this.foot);
    this.text = "";
    this.thought = null;
  }

  push(text) {
    this.text += text;
    this.tail.appendData(text); // appends in place: a long answer costs no more per token than a short one
  }

  /** What a model thinks before it answers stands above it, folded. */
  think(text) {
    if (!this.thought) {
      const fold = make("details", "thought");
      this.thought = document.createTextNode("");
      const body = make("p", "text");
      body.append(this.thought);
      fold.append(make("summary", "", "Thoughts"), body);
      this.element.insertBefore(fold, this.body);
    }
    this.thought.appendData(text);
  }

  /** Say how it went, and offer the text for copying. */
  end(facts) {
    this.element.setAttribute("aria-busy", "false");
    if (this.text) this.foot.append(copier(() => this.text));
    this.foot.append(make("span", "facts", facts.join(" · ")));
  }

  fail(sentence, retry) {
    const box = make("div", "error");
    box.setAttribute("role", "alert");
    const again = make("button", "quiet", "Try again");
    again.type = "button";
    again.addEventListener("click", retry);
    box.append(make("p", "", sentence), again);
    this.element.insertBefore(box, this.foot);
  }
}

function copier(text) {
  const button = make("button", "quiet small", "Copy");
  button.type = "button";
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text());
      button.textContent = "Copied";
    } catch {
      button.textContent = "Not allowed"; // the clipboard needs https or localhost
    }
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  return button;
}
