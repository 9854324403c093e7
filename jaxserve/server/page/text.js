// Text as it comes, put into blocks: prose, and code between fences. Only ever text nodes; no other mark-up is read.

import { make } from "./make.js";

const MAY_OPEN = /^ {0,3}`{0,2}$/; // a line that has just begun: it may become a fence
const FENCE = /^ {0,3}```[^`]*$/;

export class Text {
  constructor() {
    this.element = make("div", "blocks");
    this.raw = "";
    this.held = ""; // the beginning of a line that is, or may be, a fence
    this.isLineStart = true;
    this.open("p");
  }

  push(text) {
    this.raw += text;
    this.held += text;
    while (this.held) {
      const end = this.held.indexOf("\n");
      if (this.isLineStart) {
        const line = end < 0 ? this.held : this.held.slice(0, end);
        const isFence = FENCE.test(line) && (this.tag === "p" || line.trim() === "```");
        if (end < 0 && (isFence || MAY_OPEN.test(line))) return; // the rest of the line tells
        if (isFence) {
          this.held = this.held.slice(end + 1);
          this.open(this.tag === "p" ? "pre" : "p");
          continue;
        }
      }
      const size = end < 0 ? this.held.length : end + 1;
      // In place: a long answer costs no more per token than a short one. Prose begins with its first line that is not empty.
      if (this.tag === "pre" || this.tail.length || this.held.slice(0, size).trim()) this.tail.appendData(this.held.slice(0, size));
      this.held = this.held.slice(size);
      this.isLineStart = end >= 0;
    }
  }

  /** Nothing more will come, so what was held back is text, or the last fence. */
  end() {
    if (!FENCE.test(this.held) || this.tag === "p") this.tail.appendData(this.held);
    this.held = "";
    for (const block of [...this.element.children]) if (!block.textContent.trim()) block.remove();
  }

  open(tag) {
    if (this.tag === "p") this.tail.data = this.tail.data.trimEnd();
    const block = make(tag, tag === "p" ? "text" : "code");
    if (tag === "pre") block.tabIndex = 0; // wide code scrolls, also by keyboard
    this.tail = document.createTextNode("");
    this.tag = tag;
    this.isLineStart = true;
    block.append(this.tail);
    this.element.append(block);
  }
}
