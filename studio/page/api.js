// What all pages share: asking the server, and making elements. Text of people's goes into a page as text only
// (textContent), never as HTML.

export const $ = (id) => document.getElementById(id);

export class ApiError extends Error {}

// The answer to a request as JSON; `body` is sent as JSON. Throws ApiError with what is wrong and what to do; `answer`
// is all that the server said of it.
export async function call(path, { method = "GET", body, signal } = {}) {
  const options = { method, signal };
  if (body !== undefined) {
    options.headers = { "content-type": "application/json" };
    options.body = JSON.stringify(body);
    if (method === "GET") options.method = "POST";
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server can’t be reached. Is it still running?");
  }
  if (response.status === 401) location.reload(); // to the form that asks for the token
  const answer = await response.json().catch(() => ({ error: `The server answered ${response.status}.`, hint: "" }));
  if (!response.ok) {
    const error = new ApiError([answer.error, answer.hint].filter(Boolean).join(" — "));
    error.status = response.status;
    error.answer = answer;
    throw error;
  }
  return answer;
}

// An element: element("button", { className: "quiet", onclick }, "Text", child, …)
export function element(kind, more = {}, ...children) {
  const made = Object.assign(document.createElement(kind), more);
  made.append(...children);
  return made;
}
