// Answers on their way to the server. Each is kept in this tab until the server has said that it is on disk, also over
// a reload, and sent in order, one at a time; where the server is away it is sent again until it arrives.

import { call } from "/api.js";

const PAUSES = [0.3, 1, 2, 4]; // seconds before an answer is sent again; then always the last
const FINAL = [400, 403, 404, 405, 413, 415, 422]; // what no further try would change

const outboxes = new Map();

addEventListener("beforeunload", (event) => {
  if ([...outboxes.values()].some((outbox) => outbox.count)) event.preventDefault(); // the browser asks first
});

// The outbox of this name: there is one of it in a tab, also after its page was left and opened again.
// handlers: onChange(outbox), onConfirmed(entry, answer), onRefused(entry, error).
export function outboxOf(name, handlers) {
  const outbox = outboxes.get(name) ?? new Outbox(name);
  outboxes.set(name, Object.assign(outbox, handlers));
  return outbox;
}

class Outbox {
  trouble = ""; // why nothing can be sent now
  #name;
  #entries;
  #sending = false;

  constructor(name) {
    this.#name = `tastemaker.outbox.${name}`;
    this.#entries = JSON.parse(sessionStorage.getItem(this.#name) ?? "[]");
    setTimeout(() => this.#send()); // once there are handlers
  }

  get count() {
    return this.#entries.length;
  }

  get bodies() {
    return this.#entries.map((entry) => entry.body);
  }

  // Send `body` to `path` once all before it have arrived. The entry is what `withdraw` takes.
  add(path, body) {
    const entry = { path, body };
    this.#entries.push(entry);
    this.#keep();
    this.#send();
    return entry;
  }

  // Whether an entry could be taken back: false once it was sent, though it may not have arrived.
  withdraw(entry) {
    const place = this.#entries.indexOf(entry);
    if (place < 0 || entry.sent) return false;
    this.#entries.splice(place, 1);
    this.#keep();
    return true;
  }

  #keep() {
    sessionStorage.setItem(this.#name, JSON.stringify(this.#entries));
    this.onChange(this);
  }

  async #send() {
    if (this.#sending) return;
    this.#sending = true;
    for (let tries = 0; this.#entries.length; ) {
      const entry = this.#entries[0];
      entry.sent = true;
      try {
        const answer = await call(entry.path, { body: entry.body });
        this.#over(entry);
        this.onConfirmed(entry, answer);
        tries = 0;
      } catch (error) {
        if (FINAL.includes(error.status)) {
          this.#over(entry);
          this.onRefused(entry, error);
          continue;
        }
        this.trouble = error.message;
        this.onChange(this);
        await pause(PAUSES[Math.min(tries++, PAUSES.length - 1)]);
      }
    }
    this.#sending = false;
  }

  #over(entry) {
    this.trouble = "";
    this.#entries.splice(this.#entries.indexOf(entry), 1);
    this.#keep();
  }
}

const pause = (seconds) => new Promise((done) => setTimeout(done, seconds * 1000));
