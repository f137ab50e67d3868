// With a session, "Try it out" requests need Django's CSRF token.
const token = document.cookie.match(/(?:^|; )csrftoken=([^;]+)/);

SwaggerUIBundle({
  url: new URL("schema", location).href,
  dom_id: "#description",
  deepLinking: true,
  displayRequestDuration: true,
  docExpansion: "list",
  defaultModelsExpandDepth: 0,
  validatorUrl: null,
  requestInterceptor: (request) => {
    if (token && new URL(request.url, location).origin === location.origin)
      request.headers["X-CSRFToken"] = token[1];
    return request;
  },
});
