// The engine's feed: connected while somebody can see it.

import { ask } from "../net/api.js";
import { events } from "../net/events.js";

const SOONEST = 1000; // ms before another try
const LATEST = 30000;

/** Calls `heard(event, body)` with each event, and `state(text)` as the connection changes. */
export class Feed {
  constructor(heard, state) {
    this.heard = heard;
    this.state = state;
    this.wanted = false;
    this.finished = false; // the model has nothing to show
    this.connection = null;
    this.timer = null;
    this.pause = SOONEST;
  }

  /** Whether to be connected. */
  want(wanted) {
    if (this.wanted === wanted) return;
    this.wanted = wanted;
    if (wanted) this.connect();
    else this.disconnect();
  }

  /** At once, with another API key perhaps. */
  retry() {
    this.disconnect();
    this.pause = SOONEST;
    if (this.wanted) this.connect();
  }

  disconnect() {
    clearTimeout(this.timer);
    this.connection?.abort();
    this.connection = null;
  }

  async connect() {
    if (this.finished) return;
    const connection = new AbortController();
    this.connection = connection;
    let status = 0;
    try {
      const response = await ask("/v1/live", { signal: connection.signal });
      for await (const { event, data } of events(response)) {
        if (connection.signal.aborted) return;
        this.pause = SOONEST;
        this.heard(event, JSON.parse(data));
      }
    } catch (error) {
      status = error.status ?? 0;
    }
    if (connection.signal.aborted || this.finished) return;
    if (status === 401 || status === 404) {
      this.state(status === 401 ? "needs the API key" : "");
      return; // `retry` comes with a key
    }
    this.state("not connected");
    this.timer = setTimeout(() => this.connect(), this.pause);
    this.pause = Math.min(2 * this.pause, LATEST);
  }
}
