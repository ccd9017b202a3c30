"use strict";
// One clock for all films: those in view follow it, so the same moment stands side by side.
(() => {
  const films = [...document.querySelectorAll("video")];
  const play = document.getElementById("play");
  if (!films.length || !play) return;
  const time = document.getElementById("time");
  const clock = document.getElementById("clock");
  const rate = document.getElementById("rate");
  const rates = [1, 0.5, 0.25];
  const HOLD = 0.6; // seconds that the last frame stays before all start again
  const DRIFT = 0.12; // seconds that a film may be off before it is put right
  const visible = new Set();
  let moment = 0, speed = 1, playing = false, last = 0;

  const longest = () => Math.max(...films.map((film) => film.duration || 0), 0.001);
  const inside = (film) => Math.min(moment, Math.max(0, (film.duration || 0) - 0.5 / Number(film.dataset.fps)));
  const place = (film) => { if (film.readyState > 0) film.currentTime = inside(film); };

  function show() {
    time.value = String(Math.round((1000 * Math.min(moment, longest())) / longest()));
    clock.value = `${Math.min(moment, longest()).toFixed(1)} s`;
    time.setAttribute("aria-valuetext", clock.value);
  }

  function follow(film) {
    const ended = moment >= (film.duration || 0);
    film.playbackRate = speed;
    if (Math.abs(film.currentTime - inside(film)) > DRIFT) place(film);
    if (playing && !ended && film.paused) film.play().catch(() => setPlaying(false));
  }

  function tick(now) {
    if (!playing) return;
    moment += ((now - last) / 1000) * speed;
    last = now;
    if (moment > longest() + HOLD) {
      moment = 0;
      visible.forEach(place);
    }
    visible.forEach(follow);
    show();
    requestAnimationFrame(tick);
  }

  function setPlaying(next) {
    if (next === playing) return;
    playing = next;
    play.textContent = playing ? "Pause" : "Play";
    if (!playing) { films.forEach((film) => film.pause()); visible.forEach(place); return; }
    if (moment >= longest()) moment = 0;
    last = performance.now();
    requestAnimationFrame(tick);
  }

  const seen = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) { visible.add(target); place(target); } else { visible.delete(target); target.pause(); }
    }
  });
  for (const film of films) {
    film.controls = false;
    film.muted = true;
    seen.observe(film);
    film.addEventListener("click", () => setPlaying(!playing));
  }
  play.addEventListener("click", () => setPlaying(!playing));
  rate.addEventListener("click", () => {
    speed = rates[(rates.indexOf(speed) + 1) % rates.length];
    rate.textContent = { 1: "1×", 0.5: "½×", 0.25: "¼×" }[speed];
    rate.setAttribute("aria-label", `Speed: ${rate.textContent}`);
  });
  function seek(next) {
    setPlaying(false);
    moment = Math.min(Math.max(next, 0), longest());
    visible.forEach(place);
    show();
  }
  time.addEventListener("input", () => seek((Number(time.value) / 1000) * longest()));

  // Keys work while a film is in view, and leave those alone that the focused element has a use for.
  const frame = 1 / Math.max(...films.map((film) => Number(film.dataset.fps)));
  const keys = {
    " ": () => setPlaying(!playing),
    ArrowLeft: () => seek((Math.round(moment / frame) - 1) * frame),
    ArrowRight: () => seek((Math.round(moment / frame) + 1) * frame),
    Home: () => seek(0),
  };
  const busy = (target, key) =>
    target.closest(key === " " ? "button, summary, a" : "pre, .scroll") || target.isContentEditable;
  document.addEventListener("keydown", (event) => {
    const act = keys[event.key];
    if (!act || event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
    if (!visible.size || busy(event.target, event.key)) return;
    event.preventDefault();
    act();
  });
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) setPlaying(true);
})();
