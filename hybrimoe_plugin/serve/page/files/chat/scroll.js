// The newest text stays in sight, unless somebody reads further up.

import { byId } from "../dom.js";

const NEAR = 60; // pixels

/** Follows the end of the conversation. */
export class Scroll {
  constructor() {
    this.place = byId("scroller");
    this.button = byId("to-end");
    this.following = true;
    this.place.addEventListener("scroll", () => {
      const { scrollHeight, scrollTop, clientHeight } = this.place;
      this.following = scrollHeight - scrollTop - clientHeight < NEAR;
      this.button.hidden = this.following;
    });
    this.button.addEventListener("click", () => this.toEnd());
  }

  /** After the conversation has grown. */
  grown() {
    if (this.following) this.toEnd();
    else this.button.hidden = false;
  }

  toEnd() {
    this.place.scrollTop = this.place.scrollHeight;
    this.following = true;
    this.button.hidden = true;
  }
}
