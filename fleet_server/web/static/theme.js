// Before anything is painted: the theme that was chosen, else the one of the system.
(() => {
  const kept = localStorage.getItem("shoal-theme");
  const dark = kept ? kept === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "dark" : "light";
})();
