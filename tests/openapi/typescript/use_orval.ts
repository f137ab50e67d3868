// Uses the client that orval generates: URL TOKEN USER.
import * as api from "./api.js";

declare const process: { argv: string[] };
const [url, token, user] = process.argv.slice(2) as [string, string, string];
const send = globalThis.fetch;
globalThis.fetch = (path, options) =>
  send(`${url}${path}`, {
    ...options,
    headers: { ...options?.headers, authorization: `Bearer ${token}` },
  });

function check(truth: unknown, what: string): asserts truth {
  if (!truth) throw new Error(what);
}

const accepted = await api.sendMessage({ content: "One" });
check(accepted.status === 202, "send");
const retried = await api.retryRun(accepted.data.runId);
check(retried.status === 409, "a queued run cannot be retried");
const page = await api.getThreads({ "page[size]": 1, include: ["messages", "runs"] });
check(page.status === 200 && page.data.included?.length === 2, "include");
const registered = await api.registerBot({
  data: { type: "bot-registration", attributes: { username: user } },
});
check(registered.status === 201, "register");
const added = await api.addCommand({
  data: {
    type: "bot-command",
    attributes: {
      botId: registered.data.data.id,
      command: "chat.reply",
      filter: { type: "matrix-event", event_type: "m.room.message", content_type: "m.text" },
    },
  },
});
check(added.status === 201, "command");
const refused = await api.subscribe({
  data: { type: "webhook-subscription", attributes: { url: "https://elsewhere.example.org/" } },
});
check(refused.status === 400 && refused.data.errors[0]?.detail, "error");
const gone = await api.deleteBot({ data: { type: "bot-registration", id: registered.data.data.id } });
check(gone.status === 204, "delete");
console.log("ok");
