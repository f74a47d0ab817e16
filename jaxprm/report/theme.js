"use strict";

/* The system's theme, until the reader presses the button. Where storage is refused, the choice lasts for the visit. */
(function theme() {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const stored = () => { try { return localStorage.getItem("jaxprm-theme"); } catch { return null; } };
  const store = (value) => { try { localStorage.setItem("jaxprm-theme", value); } catch { /* lasts for the visit */ } };
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const show = () => button.setAttribute("aria-pressed", String(dark()));
  if (["light", "dark"].includes(stored())) root.dataset.theme = stored();
  button.setAttribute("aria-label", "Dark theme");
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    store(root.dataset.theme);
    show();
  });
  system.addEventListener("change", show);
  show();
})();
