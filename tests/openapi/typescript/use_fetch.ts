// Uses the types that openapi-typescript generates, with openapi-fetch: URL TOKEN USER.
import createClient from "openapi-fetch";
import type { paths } from "./schema.js";

declare const process: { argv: string[] };
const [url, token] = process.argv.slice(2) as [string, string, string];
const api = createClient<paths>({ baseUrl: url, headers: { authorization: `Bearer ${token}` } });

function check(truth: unknown, what: string): asserts truth {
  if (!truth) throw new Error(what);
}

const accepted = await api.POST("/api/chat/messages", { body: { content: "One" } });
check(accepted.response.status === 202, "send");
const { threadId, runId } = accepted.data as { threadId: string; runId: string };
const created = await api.POST("/api/messages", {
  body: {
    data: {
      type: "messages",
      attributes: { content: "Two" },
      relationships: { thread: { data: { type: "threads", id: threadId } } },
    },
  },
  headers: { "content-type": "application/vnd.api+json" },
});
check(created.data?.data.attributes?.content === "Two", "create");
check((await api.POST("/api/chat/runs/{run_id}/cancel", { params: { path: { run_id: runId } } })).data, "cancel");

const page = await api.GET("/api/runs", {
  params: { query: { "page[size]": 1, include: ["thread", "message"], "filter[status]": ["queued", "cancelled"] } },
});
check(page.data?.data.length === 1 && page.data.links?.next, "page");
check(page.data.included?.length === 2, "include");
const missing = await api.GET("/api/runs/{id}", { params: { path: { id: "run_missing" } } });
check(missing.error?.errors[0]?.status === "404", "error");
const plain = await api.GET("/api/chat/runs/{run_id}", { params: { path: { run_id: "run_missing" } } });
check(plain.error?.ok === false, "plain error");
const gone = await api.DELETE("/api/chat/threads/{thread_id}", { params: { path: { thread_id: threadId } } });
check(gone.response.status === 204, "delete");
console.log("ok");
