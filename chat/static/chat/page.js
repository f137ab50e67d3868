// Make the chat page live. Without this file its forms and links still work.
// All HTML comes from the server, which sanitises model output; streamed content is inserted as text.

const PATIENCE = 5000; // milliseconds without an event before the state of a run is fetched

// "/", or the path below which a proxy serves the pages.
const base = document.documentElement.dataset.base;
const body = document.body;
const threadId = body.dataset.thread;
const turns = document.getElementById("turns");
const notice = document.getElementById("notice");
const composer = document.getElementById("composer");
const input = document.getElementById("message");
const stopButton = document.getElementById("stop");
const earlier = new URLSearchParams(location.search).has("before");
const stepTemplate = document.getElementById("step");

// A response that a retry will not change.
class RequestError extends Error {}

let stream = null; // of the active run, or of the thread
let key = null; // the idempotency key of the message in the composer

document.documentElement.classList.add("js");

// Requests

const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

function showNotice(text, kind = "") {
  if (notice.textContent !== text) notice.textContent = text;
  notice.className = kind;
}

async function request(url, options = {}) {
  let response;
  try {
    response = await fetch(url, options);
  } catch {
    throw new Error("The server cannot be reached.");
  }
  if (response.status >= 500) throw new Error("The server has a problem.");
  // A signed-out user is redirected to the login page.
  if (response.status === 401 || response.redirected) {
    throw new RequestError("You are signed out. Sign in again in another tab; your draft stays here.");
  }
  return response;
}

function post(url, data, headers = {}) {
  // From the cookie, since signing in again in another tab renews it.
  const cookie = document.cookie.match(/(?:^|; )csrftoken=([^;]+)/);
  const token = cookie?.[1] ?? document.querySelector("[name=csrfmiddlewaretoken]").value;
  return request(url, {
    method: "POST",
    headers: {
      "Content-Type": "application/json",
      "X-CSRFToken": token,
      "X-Chat-User": body.dataset.user,
      ...headers,
    },
    body: JSON.stringify(data),
  });
}

async function errorOf(response) {
  const body = await response.json().catch(() => ({}));
  return body.error || "The server rejected the request.";
}

async function documentAt(url) {
  const response = await request(url);
  if (!response.ok) throw new RequestError("This page no longer exists.");
  return new DOMParser().parseFromString(await response.text(), "text/html");
}

// Turns

async function turnOf(runId) {
  const turn = (await documentAt(`${base}runs/${runId}`)).querySelector(".turn");
  decorate(turn);
  return turn;
}

// Insert the turn at its position in the conversation, or replace its earlier state.
function put(turn) {
  const old = document.getElementById(turn.id);
  // The thread's stream reports it as well; its run is already subscribed to.
  if (old?.hasAttribute("aria-busy") && turn.hasAttribute("aria-busy")) return;
  const open = old?.querySelector(".steps")?.open;
  keepScrolledToEnd(() => {
    if (old) {
      turn.querySelector(".steps").open = open;
      const focused = old.contains(document.activeElement);
      old.replaceWith(turn);
      if (focused) input.focus({ preventScroll: true });
    } else {
      const number = (each) => Number(each.dataset.turn);
      const next = [...turns.children].find((each) => number(each) > number(turn));
      turns.insertBefore(turn, next ?? null);
    }
  });
}

function decorate(root) {
  for (const pre of root.querySelectorAll(".prose pre")) {
    if (!navigator.clipboard) break;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "copy";
    button.textContent = "Copy";
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(pre.querySelector("code")?.textContent ?? pre.textContent);
      button.textContent = "Copied";
      setTimeout(() => (button.textContent = "Copy"), 2000);
    });
    const frame = document.createElement("div");
    frame.className = "code";
    pre.replaceWith(frame);
    frame.append(pre, button);
  }
  for (const time of root.querySelectorAll("time")) {
    const format = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });
    time.textContent = format.format(new Date(time.dateTime));
  }
}

function keepScrolledToEnd(change) {
  const page = document.scrollingElement;
  const isAtEnd = page.scrollHeight - page.scrollTop - page.clientHeight < 80;
  change();
  if (isAtEnd) page.scrollTop = page.scrollHeight;
}

const activeTurn = () => turns.querySelector(".turn[aria-busy]");
const isStreamingRun = () => stream instanceof RunStream && !stream.closed;

// Streams

function subscribe() {
  stream?.close();
  stream = null;
  const turn = activeTurn();
  stopButton.hidden = !turn;
  if (turn) {
    stopButton.setAttribute("form", `stop-${turn.dataset.run}`);
    stream = new RunStream(turn);
  } else if (threadId && !document.hidden && !earlier) {
    stream = new ThreadStream();
  }
}

// A stream that reconnects after its last event until it is closed. The browser reconnects by
// itself unless a proxy or the server responds with an error.
class Stream {
  constructor(url, handlers, last) {
    this.url = url;
    this.handlers = handlers;
    this.last = last;
    this.failures = 0;
    this.closed = false;
    this.open();
  }

  open() {
    this.source = new EventSource(this.last ? `${this.url}?after=${this.last}` : this.url);
    this.source.onopen = () => {
      this.failures = 0;
      if (notice.classList.contains("reconnecting")) showNotice("");
    };
    this.source.onerror = () => this.failed();
    for (const [kind, handle] of Object.entries(this.handlers)) {
      this.source.addEventListener(kind, (event) => {
        this.last = event.lastEventId || this.last;
        handle(JSON.parse(event.data));
      });
    }
    this.source.addEventListener("stream.closed", () => this.revoked());
  }

  // The server closes a stream when access is lost; it may have been renewed in another tab.
  async revoked() {
    this.source.close();
    await pause(1000);
    if (!this.closed && (await this.exists())) this.open();
  }

  async failed() {
    if (this.closed) return;
    showNotice("Reconnecting…", "reconnecting");
    if (this.source.readyState !== EventSource.CLOSED) return;
    this.failures += 1;
    await pause(Math.min(15000, 500 * 2 ** this.failures));
    if (!this.closed && (await this.exists())) this.open();
  }

  // True while the resource of the stream exists, as far as is known.
  async exists() {
    return true;
  }

  close() {
    this.closed = true;
    this.source.close();
  }
}

class RunStream extends Stream {
  constructor(turn) {
    super(`${base}api/chat/runs/${turn.dataset.run}/events`, {
      "run.status": (data) => this.status(data),
      "run.retrying": () => this.refreshState(),
      "message.delta": (data) => this.text(data),
      "step.started": (data) => this.step(data),
      "step.finished": (data) => this.step(data),
      gap: () => this.write(" […] "),
      "run.completed": () => this.end(),
      "run.failed": () => this.end(),
      "run.cancelled": () => this.end(),
      "run.deleted": () => this.end(),
    }, turn.dataset.after);
    this.turn = turn;
    this.attempt = 0;
    this.modelStep = 0;
    this.watch();
  }

  get draft() {
    return this.turn.querySelector(".draft");
  }

  touch() {
    this.lastEventAt = Date.now();
  }

  status({ attempt }) {
    if (attempt === this.attempt) return;
    // A new attempt discards the output of the previous one.
    this.attempt = attempt;
    this.draft.textContent = "";
    this.turn.querySelector(".steps ol").replaceChildren();
    if (attempt) this.showState("Answering.");
    this.touch();
  }

  text({ step, text }) {
    // The answer is the output of the last model call.
    if (step !== this.modelStep) this.draft.textContent = "";
    this.modelStep = step;
    this.write(text);
  }

  write(text) {
    this.touch();
    // Strip bidirectional control characters (chat/markdown.py).
    keepScrolledToEnd(() => this.draft.append(text.replace(/[\u202a-\u202e\u2066-\u2069]/g, "")));
  }

  step(data) {
    this.touch();
    const list = this.turn.querySelector(".steps ol");
    let row = list.querySelector(`[data-step="${Number(data.step)}"]`);
    if (!row) {
      row = stepTemplate.content.firstElementChild.cloneNode(true);
      row.dataset.step = data.step;
      list.append(row);
    }
    const fill = (name, text) => (row.querySelector(`.${name}`).textContent = text);
    fill("kind", data.kind);
    fill("name", data.name);
    const ended = data.durationMs !== undefined;
    const ms = data.durationMs;
    fill("time", !ended ? "…" : ms < 1000 ? `${ms} ms` : `${(ms / 1000).toFixed(ms < 10000 ? 1 : 0)} s`);
    if (data.promptTokens || data.completionTokens) {
      fill("tokens", `${data.promptTokens} in, ${data.completionTokens} out`);
    }
    fill("problem", data.error ?? "");
    if (data.kind === "tool") this.showState(ended ? "Answering." : `Using ${data.name}.`);
  }

  showState(text) {
    const state = this.turn.querySelector(".state");
    if (state && state.textContent !== text) state.textContent = text;
  }

  // After a while without events, fetch what the run waits for.
  async watch() {
    this.touch();
    while (!this.closed) {
      await pause(PATIENCE / 5);
      if (this.closed || Date.now() - this.lastEventAt < PATIENCE) continue;
      await this.refreshState();
    }
  }

  async refreshState() {
    this.touch();
    const turn = await turnOf(this.turn.dataset.run).catch(() => null);
    if (this.closed || !turn) return;
    if (turn.hasAttribute("aria-busy")) this.showState(turn.querySelector(".state").textContent);
    else this.settle(turn);
  }

  async exists() {
    try {
      const turn = await turnOf(this.turn.dataset.run);
      if (turn.hasAttribute("aria-busy")) return true;
      this.settle(turn);
    } catch (error) {
      if (!(error instanceof RequestError)) return true;
      this.close();
      showNotice(error.message, "problem");
    }
    return false;
  }

  async end() {
    this.close();
    while (true) {
      try {
        return this.settle(await turnOf(this.turn.dataset.run));
      } catch (error) {
        if (error instanceof RequestError) return showNotice(error.message, "problem");
        showNotice("Reconnecting…", "reconnecting");
        await pause(2000);
      }
    }
  }

  settle(turn) {
    this.close();
    if (notice.classList.contains("reconnecting")) showNotice("");
    const partial = this.draft?.textContent;
    put(turn);
    // The partial output of a cancelled run is saved when its worker releases it.
    if (partial && turn.dataset.status === "cancelled" && !turn.querySelector(".prose")) {
      pause(1500).then(() => turnOf(turn.dataset.run)).then(put, () => {});
    }
    subscribe();
  }
}

class ThreadStream extends Stream {
  constructor() {
    // Events are numbered by message and outcome. Subscribe after the last turn shown without a gap.
    let last = turns.firstElementChild;
    const number = (turn) => Number(turn.dataset.turn);
    for (let next; (next = last?.nextElementSibling) && number(next) === number(last) + 1; ) last = next;
    super(`${base}api/chat/threads/${threadId}/events`, {
      "message.created": ({ runId }) => this.messageCreated(runId),
    }, last ? 2 * Number(last.dataset.turn) + 2 : 0);
  }

  async exists() {
    try {
      if ((await request(`${base}api/chat/threads/${threadId}`)).ok) return true;
      showNotice("This conversation no longer exists.", "problem");
    } catch (error) {
      if (!(error instanceof RequestError)) return true;
      showNotice(error.message, "problem");
    }
    this.close();
    return false;
  }

  // A message sent from another window or client.
  async messageCreated(runId) {
    if (document.getElementById(runId)) return;
    try {
      put(await turnOf(runId));
    } catch (error) {
      if (error instanceof RequestError) return;
      await pause(2000);
      if (stream === this) subscribe();
      return;
    }
    if (!this.closed && activeTurn()) subscribe();
  }
}

// User actions

composer.addEventListener("submit", async (event) => {
  event.preventDefault();
  const content = input.value.trim();
  if (!content || composer.hasAttribute("aria-busy")) return;
  const payload = { content, model: composer.elements.model.value || null };
  if (threadId) payload.threadId = threadId;
  key ??= Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16)).join("-");
  composer.setAttribute("aria-busy", "true");
  input.readOnly = true; // edits made meanwhile would be lost
  showNotice("");
  try {
    const response = await post(`${base}api/chat/messages`, payload, { "Idempotency-Key": key });
    if (!response.ok) throw new RequestError(await errorOf(response));
    const accepted = await response.json();
    clearDraft();
    if (!threadId || earlier) return location.assign(`${base}threads/${accepted.threadId}`);
    document.scrollingElement.scrollTop = document.scrollingElement.scrollHeight;
    const turn = await turnOf(accepted.runId).catch(() => null);
    if (turn) put(turn);
    else showNotice("Your message was sent. Reload the page to see it.", "problem");
    if (!isStreamingRun()) subscribe();
    const current = document.querySelector("#thread-list [aria-current]")?.parentElement;
    current?.parentElement.prepend(current);
  } catch (error) {
    if (error instanceof RequestError) key = null;
    const hint = error instanceof RequestError ? "" : " Try sending it again.";
    showNotice(error.message + hint, "problem");
  } finally {
    input.readOnly = false;
    composer.removeAttribute("aria-busy");
  }
});

function clearDraft() {
  key = null;
  input.value = "";
  sessionStorage.removeItem(draftName);
}

document.addEventListener("submit", async (event) => {
  const url = event.target.dataset.api;
  if (!url) return;
  event.preventDefault();
  const runId = event.target.closest(".turn").dataset.run;
  try {
    const response = await post(url, {});
    // 409: the run has finished, or another client acted first. The turn shows which.
    if (!response.ok && response.status !== 409) throw new RequestError(await errorOf(response));
    put(await turnOf(runId));
    subscribe();
  } catch (error) {
    showNotice(error.message, "problem");
  }
});

document.addEventListener("click", async (event) => {
  const link = event.target.closest("[data-more]");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  try {
    const page = await documentAt(link.href);
    const list = document.getElementById(link.dataset.more);
    const items = [...page.getElementById(link.dataset.more).children];
    const first = items[0]?.querySelector("a, summary");
    if (link.id === "earlier") {
      items.forEach(decorate);
      // A screen reader announces new answers, not the messages before them.
      const log = list.closest("[aria-live]");
      log.setAttribute("aria-live", "off");
      pause(1000).then(() => log.setAttribute("aria-live", "polite"));
      const below = document.scrollingElement.scrollHeight - scrollY;
      list.prepend(...items);
      scrollTo(0, document.scrollingElement.scrollHeight - below);
    } else {
      list.append(...items);
    }
    const next = page.getElementById(link.id);
    if (next) link.href = next.getAttribute("href");
    else link.remove();
    first?.focus({ preventScroll: true });
  } catch (error) {
    showNotice(error.message, "problem");
  }
});

// An expanded element at the end of the page would be hidden by the composer.
document.addEventListener("toggle", (event) => {
  if (event.target.open) event.target.scrollIntoView({ block: "nearest" });
}, true);

// On devices without a Shift key, Enter starts a new line.
const hasKeys = !matchMedia("(pointer: coarse)").matches;
// WebKit ends a composition before the Enter that confirms it, and marks that one with key code 229.
const isComposing = (event) => event.isComposing || event.keyCode === 229;
input.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || isComposing(event) || !hasKeys) return;
  event.preventDefault();
  composer.requestSubmit();
});

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || isComposing(event) || stopButton.hidden) return;
  if (document.querySelector(":popover-open")) return;
  stopButton.click();
});

// Keep the draft across reloads.
const draftName = `draft ${threadId ?? ""}`;
composer.addEventListener("input", () => {
  key = null;
  sessionStorage.setItem(draftName, input.value);
});
// Signing out removes drafts for the next user of this window.
document.querySelector('form[action$="/logout"]')?.addEventListener("submit", () => sessionStorage.clear());
input.value ||= sessionStorage.getItem(draftName) ?? "";

document.addEventListener("visibilitychange", () => {
  if (!isStreamingRun()) subscribe();
});

decorate(document);
if (threadId && !location.hash) {
  document.scrollingElement.scrollTop = document.scrollingElement.scrollHeight;
}
if (hasKeys && document.activeElement === body) input.focus({ preventScroll: true });
subscribe();
